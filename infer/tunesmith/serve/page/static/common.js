// What both views need: the key, requests to this server, and small makers of elements.

const KEY = "tunesmith-key";
export const asksKey = document.documentElement.dataset.asksKey === "true";

export const key = () => sessionStorage.getItem(KEY) ?? "";
export const setKey = (text) =>
  text ? sessionStorage.setItem(KEY, text) : sessionStorage.removeItem(KEY);

export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** A request with the key; throws Refused with what the server says. */
export async function send(path, body, signal) {
  const headers = {};
  if (key()) headers.Authorization = `Bearer ${key()}`;
  if (body) headers["Content-Type"] = "application/json";
  const method = body ? "POST" : "GET";
  const answer = await fetch(path, { method, headers, signal, body: body && JSON.stringify(body) });
  if (answer.ok) return answer;
  let message = `HTTP ${answer.status}`;
  try {
    message = (await answer.json()).error.message;
  } catch {
    // Not one of our errors; its status has to do.
  }
  throw new Refused(answer.status, message);
}

export const get = (id) => document.getElementById(id);

/** An element with text, classes and attributes; texts are never read as HTML. */
export function make(name, { text, ...attributes } = {}, ...children) {
  const element = document.createElement(name);
  for (const [attribute, value] of Object.entries(attributes)) {
    if (attribute.startsWith("on")) element.addEventListener(attribute.slice(2), value);
    else if (value !== undefined) element.setAttribute(attribute, value);
  }
  if (text !== undefined) element.textContent = text;
  element.append(...children);
  return element;
}

const count = new Intl.NumberFormat("en");
export const whole = (value) => count.format(value);

export function short(value) {
  if (value === null || value === undefined) return "–";
  if (value >= 100) return count.format(Math.round(value));
  return value >= 10 || Number.isInteger(value) ? String(Math.round(value * 10) / 10) : value.toFixed(2);
}

export function milliseconds(value) {
  if (value === null || value === undefined) return "–";
  return value >= 10_000 ? `${(value / 1000).toFixed(1)} s` : `${short(value)} ms`;
}

export function usd(value) {
  if (value === null || value === undefined) return "–";
  if (value === 0) return "$0";
  return value >= 1 ? `$${value.toFixed(2)}` : `$${Number(value.toPrecision(2))}`;
}

let fading;
export function toast(text) {
  const element = get("toast");
  element.textContent = text;
  element.hidden = false;
  clearTimeout(fading);
  fading = setTimeout(() => (element.hidden = true), 4000);
}

// Feedback

const said = new Map();

/** Buttons that say what an answer was like; they remember what was said in this tab. */
export function thumbs(id) {
  const buttons = [
    ["Good", 1, "up"],
    ["Bad", 0, "down"],
  ].map(([text, score, label]) =>
    make("button", {
      type: "button",
      text,
      "aria-pressed": String(said.get(id) === score),
      onclick: () => tell(id, { score, label }, () => {
        said.set(id, score);
        buttons.forEach((one, at) => one.setAttribute("aria-pressed", String(at === 1 - score)));
      }),
    }),
  );
  const correct = make("button", { type: "button", text: "Correct…", onclick: () => ask(id) });
  return make("span", { class: "thumbs", role: "group", "aria-label": "Feedback" }, ...buttons, correct);
}

async function tell(id, word, done) {
  try {
    const heard = await (await send("/v1/feedback", { id, ...word })).json();
    done();
    toast(heard.is_exportable ? "Thank you, that is noted." : "Noted, though this server keeps no texts.");
  } catch (error) {
    toast(error.message);
  }
}

function ask(id) {
  const dialog = get("words");
  get("words-form").reset();
  dialog.onclose = () => {
    if (dialog.returnValue !== "send") return;
    const word = {};
    for (const name of ["correction", "comment"]) if (get(name).value.trim()) word[name] = get(name).value;
    if (Object.keys(word).length) tell(id, word, () => {});
  };
  dialog.returnValue = "";
  dialog.showModal();
}
