// The state of the engine, or of a journal, as GET /debug/live tells it: sections of rows, kept up to date by changes.
import { bytes } from "./dom.js";
import { base, events, headers, refusal } from "./server.js";

const SECTIONS = ["totals", "limits", "slots", "waiting", "steps", "requests", "curve", "tree", "journal"];
export const state = { status: "off", said: "", actors: null, everything: false, opened: new Set(), closed: new Set(), whole: new Set() };
let abort = null, watcher = "", wanted = false, wait = 500, timer = 0;
const listeners = new Set();
let frame = 0;

export function forget() {
  for (const name of SECTIONS) state[name] = {};
  for (const set of [state.opened, state.closed, state.whole]) set.clear();
}
forget();
export const onchange = (call) => listeners.add(call);

function tell() {  // once a frame at most
  if (!frame) frame = requestAnimationFrame(() => { frame = 0; for (const call of listeners) call(); });
}

// Say something above the panels.  `kept`: until the reader does something else; otherwise until the next whole view.
export function note(said, kept = true) {
  Object.assign(state, { said, kept: Boolean(said && kept) });
  tell();
}

function say(status, said = "") {
  Object.assign(state, { status, said });
  tell();
}

export function watch(on) {
  wanted = on;
  clearTimeout(timer);
  if (!on) { abort?.abort(); abort = null; say("off"); }
  else if (!abort) connect();
}

export function again() {  // with another key
  abort?.abort();
  abort = null;
  wait = 500;
  if (wanted) connect();
}

async function connect() {
  const mine = (abort = new AbortController());
  if (state.status !== "lost") say("connecting");
  try {
    const response = await fetch(base + "/debug/live", { headers: headers(), signal: mine.signal });
    if (!response.ok) {
      const error = await refusal(response);
      say("refused", error.message);
      if (response.status < 500 && response.status !== 429) { abort = null; return; }
    } else {
      for await (const data of events(response.body)) take(JSON.parse(data));
      say("lost", "The server has ended the stream.");
    }
  } catch (error) {
    if (mine.signal.aborted) return;
    say("lost", "The server cannot be reached.");
  }
  if (abort !== mine) return;
  abort = null;
  timer = setTimeout(() => wanted && !abort && connect(), wait);
  wait = Math.min(wait * 2, 5000);
}

export function take(message) {
  if (message.watcher) {
    watcher = message.watcher;
    wait = 500;
    state.everything = message.everything;
    state.most = message.journal_bytes;
    forget();
    say("live");
  }
  if (message.trouble) note(message.trouble, message.kept);
  if (message.actors) state.actors = message.actors;
  if (message.view) { forget(); if (!state.kept) state.said = ""; }
  const changes = message.view ?? message.change;
  for (const [name, rows] of Object.entries(changes ?? {})) {
    const mine = state[name];
    for (const [id, value] of Object.entries(rows)) if (value === null) delete mine[id]; else mine[id] = value;
  }
  tell();
}

// Ask the viewer: {life: uid}, {node: name}, {journal: name}, {place: n} or what is opened.
export async function ask(what) {
  const request = { method: "POST", headers: headers({ "Content-Type": "application/json" }), body: JSON.stringify({ watcher, ...what }) };
  const response = await fetch(base + "/debug/live", request);
  if (!response.ok) throw new Error((await refusal(response)).message);
  return response.json();
}

// Have a journal of this computer shown: its file, or all its parts in order.
export async function upload(files) {
  const part = (file) => Number(/\.part(\d+)$/.exec(file.name)?.[1] ?? 0);
  const body = new Blob([...files].sort((a, b) => part(a) - part(b)));
  if (body.size > state.most) throw new Error(`The journal has ${bytes(body.size)}; at most ${bytes(state.most)} can be shown here. On the server's machine, put it into journals/ of --data-dir.`);
  const request = { method: "POST", headers: headers({ "Content-Type": "application/octet-stream" }), body };
  const response = await fetch(`${base}/debug/live/journal?watcher=${watcher}`, request);
  if (!response.ok) throw new Error((await refusal(response)).message);
  return response.json();
}

export const choose = () => ask({ opened: [...state.opened], closed: [...state.closed], whole: [...state.whole] }).catch((error) => say(state.status, error.message));

// ---------------- what follows from the state
export const steps = () => Object.entries(state.steps).map(([n, step]) => ({ n: Number(n), ...step })).sort((a, b) => a.n - b.n);
export const curve = () => Object.entries(state.curve).map(([t, row]) => [Number(t), ...row]).sort((a, b) => a[0] - b[0]);
export const textShown = () => state.journal.text === true;
