// Which view is shown, who is asked for a key, and the beat of the live view.

import { Refused, asksKey, get, key, setKey } from "./common.js";
import { draw } from "./live.js";
import { begin, loadModels } from "./playground.js";

const BEAT_MS = 1000;
const VIEWS = ["live", "playground"];
let view = "live";

function show(name) {
  for (const one of [...VIEWS, "gate"]) get(one).hidden = one !== name;
  for (const one of ["views", "status"]) get(one).hidden = name === "gate";
  if (!VIEWS.includes(name)) return;
  view = name;
  for (const one of VIEWS) {
    if (one === name) get(`tab-${one}`).setAttribute("aria-current", "page");
    else get(`tab-${one}`).removeAttribute("aria-current");
  }
  if (location.hash.slice(1) !== name) history.replaceState(null, "", `#${name}`);
}

function askForKey(fault = "") {
  setKey("");
  get("key-change").hidden = true;
  get("key-fault").textContent = fault;
  show("gate");
  get("key").focus();
}

let drawing = null;
/** Draw once more, unless that is being done. */
function beat() {
  drawing ??= drawOnce().finally(() => (drawing = null));
  return drawing;
}

async function drawOnce() {
  if (document.visibilityState !== "visible" || (asksKey && !key())) return;
  const shown = key();
  try {
    await draw();
    if (asksKey) get("key-change").hidden = false;
  } catch (error) {
    if (shown !== key()) return; // the answer to another key
    if (error instanceof Refused && error.status === 401) askForKey("The server does not know this key.");
    else {
      get("status").className = "pill bad";
      get("status").textContent = "no connection";
    }
  }
}

async function enter() {
  show(VIEWS.includes(location.hash.slice(1)) ? location.hash.slice(1) : view);
  await beat();
  if (!asksKey || key()) await loadModels().catch(() => {});
}

for (const one of VIEWS) {
  get(`tab-${one}`).addEventListener("click", () => {
    if (!asksKey || key()) show(one);
    if (one === "playground") loadModels().catch(() => {});
  });
}
get("key-change").addEventListener("click", () => askForKey());
get("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey(get("key").value.trim());
  get("key").value = "";
  enter();
});
document.addEventListener("visibilitychange", beat);
begin();
if (asksKey && !key()) askForKey();
else enter();

async function loop() {
  await beat();
  setTimeout(loop, BEAT_MS);
}
setTimeout(loop, BEAT_MS);
