// The live view: one state every second, drawn into what is there.

import { get, make, milliseconds, send, short, thumbs, usd, whole } from "./common.js";

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 240;
const HEIGHT = 40;

/** A line over the seconds; nulls are gaps that are drawn through. */
function spark(svg, values) {
  const known = values.map((value, at) => [at, value]).filter(([, value]) => value !== null);
  const top = Math.max(...known.map(([, value]) => value), 1e-9);
  const points = known.map(
    ([at, value]) => `${((at / (values.length - 1)) * WIDTH).toFixed(1)},${(HEIGHT - 2 - (value / top) * (HEIGHT - 6)).toFixed(1)}`,
  );
  svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.replaceChildren();
  if (!points.length) return;
  const line = `M${points.join("L")}`;
  const [first, last] = [points[0].split(",")[0], points.at(-1).split(",")[0]];
  const parts = [["area", `${line}L${last},${HEIGHT}L${first},${HEIGHT}Z`], ["line", line]];
  for (const [name, path] of points.length > 1 ? parts : [["dot", `${line}h0.01`]]) {
    const element = document.createElementNS(SVG, "path");
    element.setAttribute("class", name);
    element.setAttribute("d", path);
    svg.append(element);
  }
}

function ago(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return seconds < 172_800 ? `${Math.round(seconds / 3600)} h` : `${Math.round(seconds / 86_400)} days`;
}

function tiles(state) {
  const { rates, server } = state;
  get("requests-per-s").textContent = short(rates.requests_per_s);
  get("ttft").textContent = short(rates.ttft_p50_ms);
  get("tokens-per-s").textContent = short(rates.tokens_per_s);
  get("usd").textContent = usd(state.usd);
  spark(get("spark-requests"), rates.requests);
  spark(get("spark-ttft"), rates.ttft_ms);
  spark(get("spark-tokens"), rates.output_tokens);
  spark(get("spark-usd"), rates.usd);
  const faults = rates.errors_per_s ? `, ${short(rates.errors_per_s)} errors/s` : "";
  get("note-requests").textContent = `${whole(server.open)} open${faults}`;
  get("note-ttft").textContent =
    rates.ttft_p95_ms === null ? "of streams in the last minute" : `p95 ${milliseconds(rates.ttft_p95_ms)}, last minute`;
  const tokens = state.costs.reduce((sum, one) => sum + one.output_tokens, 0);
  get("note-tokens").textContent = `${whole(tokens)} tokens in all`;
  const requests = state.costs.reduce((sum, one) => sum + one.requests, 0);
  const each = requests ? `, ${usd((state.usd / requests) * 1000)} per 1,000 requests` : "";
  const since = `in ${ago(state.now_s - state.began_s)}${each}`;
  get("note-usd").textContent = `${state.usd === null ? "no price is set" : since}${state.scope === "key" ? ", this key alone" : ""}`;
}

function price(upstream) {
  const { input_usd_per_million_tokens: into, output_usd_per_million_tokens: out } = upstream;
  return into === null ? "no price" : `${usd(into)} in, ${usd(out)} out per million`;
}

function rollout(one) {
  const seen = (requests, errors) => `${whole(requests)} requests, ${whole(errors)} failed`;
  return make("p", { class: "note" },
    make("span", { class: "pill", text: `rollout ${one.step} of ${one.steps}` }),
    ` ${one.candidate} at ${short(one.share * 100)} %: ${seen(one.requests, one.errors)}; the others ${seen(one.baseline_requests, one.baseline_errors)}`);
}

function routes(server) {
  const upstreams = new Map(server.upstreams.map((one) => [one.name, one]));
  const lines = server.routes.map((route) => {
    const total = route.arms.reduce((sum, arm) => sum + arm.weight, 0);
    const line = make(
      "li", {},
      make("div", { class: "route-head" },
        make("strong", { text: route.name }),
        make("span", { class: `pill ${route.is_ready ? "good" : "warn"}`, text: route.is_ready ? "ready" : "not ready" })),
    );
    if (route.rollout) line.append(rollout(route.rollout));
    const extra = [...route.fallback.map((name) => [name, "fallback"]), ...(route.shadow ? [[route.shadow, "shadow"]] : [])];
    for (const [name, share] of [...route.arms.map((arm) => [arm.name, arm.weight / total]), ...extra]) {
      const upstream = upstreams.get(name);
      if (!upstream) continue;
      const isShare = typeof share === "number";
      const arm = make("div", { class: "arm" },
        make("span", { text: upstream.name === route.name ? upstream.artifact : upstream.name }),
        make("span", { class: "end", text: isShare ? `${short(share * 100)} %` : share }));
      if (isShare) arm.append(make("progress", { class: "share", max: 1, value: share, "aria-label": "share" }));
      const state = upstream.is_ready ? `${whole(upstream.open)} open` : "not ready";
      arm.append(
        make("span", { class: "note", text: upstream.name === route.name ? price(upstream) : `${upstream.artifact} · ${price(upstream)}` }),
        make("span", { class: "note end", text: state }));
      line.append(arm);
    }
    return line;
  });
  get("routes").replaceChildren(...lines);
}

const number = (text, name) => make("td", { class: "number", text, "data-name": name });

function costs(lines) {
  const rows = lines.map((one) =>
    make("tr", {},
      make("td", { class: "long", text: one.key ?? "none" }),
      make("td", { class: "long", text: one.model ?? "none" }),
      number(whole(one.requests)), number(whole(one.prompt_tokens)), number(whole(one.output_tokens)), number(usd(one.usd))));
  const none = make("tr", {}, make("td", { class: "empty", colspan: 6, text: "No requests yet." }));
  get("costs").replaceChildren(...(rows.length ? rows : [none]));
}

function status(one) {
  const kind = one.status >= 500 || one.ending === "lost" ? "bad" : one.status >= 400 ? "warn" : one.ending === "complete" ? "good" : "";
  const told = one.guardrails.length ? `guardrails: ${one.guardrails.join(", ")}` : one.finish_reason ?? "";
  const pill = make("span", { class: `pill ${kind}`, text: `${one.status || "–"} ${one.ending}`, title: told });
  const cell = make("td", {}, pill);
  if (one.guardrails.length) cell.append(" ", make("span", { class: "pill warn", text: "guardrail", title: told }));
  return cell;
}

let shown = "";
function recent(lines) {
  const now = JSON.stringify(lines);
  if (now === shown) return; // so that nobody's click falls between two drawings
  shown = now;
  const rows = lines.map((one) => {
    const id = one.response_id ?? (one.status === 200 ? one.request_id : null);
    return make("tr", { "data-id": id ?? undefined },
      make("td", { text: new Date(one.at_s * 1000).toLocaleTimeString("en-GB"), title: one.request_id }),
      status(one),
      make("td", { class: "long", text: one.model ?? (one.path || "–"), title: one.artifact ?? "" }),
      make("td", { class: "long", text: one.key ?? "–" }),
      number(whole(one.prompt_tokens), "in"), number(whole(one.output_tokens), "out"),
      number(milliseconds(one.ttft_ms), "first token"), number(milliseconds(one.duration_ms), "took"), number(usd(one.usd)),
      make("td", {}, id && one.status === 200 ? thumbs(id) : ""));
  });
  const none = make("tr", {}, make("td", { class: "empty", colspan: 10, text: "Requests show up here as they end." }));
  get("recent").replaceChildren(...(rows.length ? rows : [none]));
}

/** Fetch and draw; throws Refused. */
export async function draw() {
  const state = await (await send("/ui/state")).json();
  const { server } = state;
  const ready = server.routes.filter((route) => route.is_ready).length;
  const isReady = ready === server.routes.length;
  const pill = get("status");
  pill.className = `pill ${server.is_draining ? "warn" : isReady ? "good" : "warn"}`;
  pill.textContent = server.is_draining ? "stopping" : isReady ? "ready" : ready ? `${ready} of ${server.routes.length} ready` : "loading";
  tiles(state);
  routes(server);
  costs(state.costs);
  recent(state.recent);
  return state;
}
