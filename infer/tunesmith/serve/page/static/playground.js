// The playground: a conversation with one model, or with two side by side.

import { get, make, milliseconds, send, short, thumbs, whole } from "./common.js";

let panes = [];
let stopping = null;

/** The models in both lists; what was chosen stays. */
export async function loadModels() {
  const models = (await (await send("/v1/models")).json()).data.map((one) => one.id);
  for (const [id, first] of [["model-a", []], ["model-b", [["", "nothing"]]]]) {
    const list = get(id);
    const chosen = list.value;
    list.replaceChildren(...[...first, ...models.map((one) => [one, one])].map(([value, text]) => make("option", { value, text })));
    if ([...list.options].some((one) => one.value === chosen)) list.value = chosen;
  }
}

class Pane {
  constructor(model) {
    this.model = model;
    this.messages = [];
    this.talk = make("div", { class: "pane" });
    this.element = make("section", { class: "card pane" }, make("h2", { text: model }), this.talk);
  }

  /** Ask, and write the answer as it comes. */
  async ask(prompt, settings, signal) {
    this.messages.push({ role: "user", content: prompt });
    const place = make("div", { class: "said assistant writing", "aria-live": "polite" });
    const foot = make("div", { class: "foot" });
    this.talk.append(make("div", { class: "said user", text: prompt }), place, foot);
    place.scrollIntoView({ block: "nearest" });
    const { system, ...options } = settings;
    const before = system ? [{ role: "system", content: system }] : [];
    const body = { model: this.model, messages: [...before, ...this.messages], stream: true, stream_options: { include_usage: true }, ...options };
    const started = performance.now();
    const found = { text: "", id: null, first: null, usage: null, artifact: null, reason: null };
    try {
      const answer = await send("/v1/chat/completions", body, signal);
      found.artifact = answer.headers.get("x-tunesmith-artifact");
      for await (const event of events(answer.body)) {
        if (event.error) throw new Error(event.error.message);
        found.id ??= event.id;
        found.usage = event.usage ?? found.usage;
        const [choice] = event.choices ?? [];
        const piece = choice?.delta?.content ?? "";
        found.reason = choice?.finish_reason ?? found.reason;
        if (!piece) continue;
        found.first ??= performance.now() - started;
        found.text += piece;
        place.append(piece);
      }
    } catch (error) {
      if (error.name !== "AbortError") {
        place.classList.add("fault");
        place.append(found.text ? `\n${error.message}` : error.message);
        if (!found.text) this.messages.pop();
      }
    }
    place.classList.remove("writing");
    if (found.text) this.messages.push({ role: "assistant", content: found.text });
    this.finish(foot, found, performance.now() - started);
  }

  finish(foot, found, took) {
    const tokens = found.usage?.completion_tokens;
    const writing = (took - (found.first ?? took)) / 1000;
    const facts = [
      found.first === null ? null : `first token ${milliseconds(found.first)}`,
      tokens > 1 && writing > 0 ? `${short((tokens - 1) / writing)} tokens/s` : null,
      tokens ? `${whole(tokens)} tokens` : null,
      milliseconds(took),
      found.reason === "length" ? "cut at max tokens" : found.reason === "content_filter" ? "ended by a guardrail" : null,
    ].filter(Boolean);
    foot.append(make("span", { class: "note", text: facts.join(" · "), title: found.artifact ?? "" }));
    if (found.id && found.text) foot.append(thumbs(found.id));
  }
}

/** The JSON of server-sent events, as they come. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").find((line) => line.startsWith("data:"))?.slice(5).trim();
      if (data && data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

function fresh() {
  stopping?.abort();
  panes = [];
  get("panes").replaceChildren();
}

function chosen() {
  return [get("model-a").value, get("model-b").value].filter(Boolean);
}

async function ask() {
  const prompt = get("prompt").value.trim();
  if (!prompt || stopping) return;
  const models = chosen();
  if (models.join("\n") !== panes.map((one) => one.model).join("\n")) {
    panes = models.map((model) => new Pane(model));
    get("panes").replaceChildren(...panes.map((one) => one.element));
  }
  get("prompt").value = "";
  const settings = {
    system: get("system").value.trim(),
    temperature: Number(get("temperature").value),
    max_tokens: Number(get("max-tokens").value),
  };
  stopping = new AbortController();
  get("send").disabled = true;
  get("stop").hidden = false;
  await Promise.all(panes.map((one) => one.ask(prompt, settings, stopping.signal)));
  stopping = null;
  get("send").disabled = false;
  get("stop").hidden = true;
}

/** Wire the form. */
export function begin() {
  get("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    ask();
  });
  get("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) get("ask").requestSubmit();
  });
  get("stop").addEventListener("click", () => stopping?.abort());
  get("fresh").addEventListener("click", fresh);
}
