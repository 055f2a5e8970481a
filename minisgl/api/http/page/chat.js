// The chat: streams answers, can be stopped, and shows which tokens of the prompt came from the cache.
import { $, el, num, pieces } from "./dom.js";
import { ask, state, textShown } from "./live.js";
import { markdown } from "./markdown.js";
import { base, events, headers, key, refusal } from "./server.js";

export const about = { model: $("model").textContent };
let turns = [], running = null;

function add(parent, kind, text = "") {
  const node = el("div", { class: kind }, text);
  parent.append(node);
  return node;
}

function counts(usage, timings) {
  const parts = [`${usage.prompt_tokens} + ${usage.completion_tokens} tokens`, `${usage.prompt_tokens_details?.cached_tokens ?? 0} cached`];
  if (timings?.tok_s) parts.push(`${timings.tok_s.toFixed(1)} tok/s`);
  if (timings?.ttft_ms) parts.push(`TTFT ${(timings.ttft_ms / 1000).toFixed(2)} s`);
  return parts.join(", ");
}

function settings() {
  const out = {};
  for (const name of ["temperature", "top_p", "top_k", "max_tokens", "seed"]) if ($(name).value !== "") out[name] = Number($(name).value);
  return out;
}

// Where the live view shows prompts: the request of an answer, by its numbers, newest first.
function requestOf(usage) {
  const cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
  const found = Object.entries(state.requests).filter(([, r]) => r[2] === usage.prompt_tokens && r[3] === cached && r[4] === usage.completion_tokens);
  return found.map(([uid]) => Number(uid)).sort((a, b) => b - a)[0];
}

function offerTokens(note, usage) {
  if (state.status !== "live" || !textShown() || state.journal.steps !== undefined) return;
  const button = el("button", { type: "button", "aria-expanded": "false" }, "tokens of the prompt");
  let box = null;
  button.addEventListener("click", async () => {
    if (box) { box.remove(); box = null; button.setAttribute("aria-expanded", "false"); return; }
    let uid;  // the engine's view comes a moment after the answer
    for (let i = 0; i < 40 && (uid = requestOf(usage)) === undefined; i++) await new Promise((done) => setTimeout(done, 100));
    try {
      if (uid === undefined) throw new Error("The engine's view no longer has this request.");
      const life = await ask({ life: uid });
      box = el("div", {}, pieces(life.prompt_pieces ?? [], life.cached ?? 0), el("div", { class: "less" }, `request ${uid}: ${num(life.cached)} of ${num(life.prompt)} tokens came from the cache (coloured)`));
    } catch (error) { box = el("div", { class: "error" }, error.message); }
    note.after(box);
    button.setAttribute("aria-expanded", "true");
  });
  note.append(" ", button);
}

export async function send(text) {
  if (!text || running) return;
  running = new AbortController();
  $("empty").hidden = $("send").hidden = true;
  $("stop").hidden = false;
  $("input").value = "";
  grow();
  const question = add($("log"), "turn user", text), answer = add($("log"), "turn waits");
  const thought = add(answer, "thought"), said = add(answer, "said"), log = $("log"), notes = [];
  log.scrollTop = log.scrollHeight;
  const mine = turns;  // another array once a new chat has begun
  let ended = false, failed = "", raw = "", drawn = 0, usage = null;
  try {
    const body = { model: about.model, stream: true, stream_options: { include_usage: true }, ...settings() };
    const system = $("system").value.trim() ? [{ role: "system", content: $("system").value }] : [];
    const request = { method: "POST", headers: headers({ "Content-Type": "application/json" }), signal: running.signal };
    let response;
    for (;;) {
      body.messages = [...system, ...mine, { role: "user", content: text }];
      response = await fetch(base + "/v1/chat/completions", { ...request, body: JSON.stringify(body) });
      if (response.ok) break;
      const error = await refusal(response);
      if (response.status === 401) {
        $("keybox").hidden = false;
        $("settings").open = true;
        $("key").focus();  // and scrolls there
        error.message = (key() ? "The server does not accept this API key: " : "The server wants an API key: ") + 'enter one under "API key".';
      }
      if (error.code !== "context_length_exceeded" || !mine.length) throw new Error(error.message);
      mine.splice(0, 2);  // the oldest question and its answer make room
      if (!notes.length) notes.push("the context is full: the oldest turns were left out");
    }
    for await (const data of events(response.body)) {
      if (data === "[DONE]") { ended = true; continue; }
      const event = JSON.parse(data), choice = event.choices?.[0], delta = choice?.delta ?? {};
      if (event.error) throw new Error(event.error.message);
      const follow = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
      if (delta.reasoning_content) thought.append(delta.reasoning_content);
      if (delta.content) {
        raw += delta.content;
        if (raw.length < 4000 || performance.now() - drawn > 200) {
          said.replaceChildren(...markdown(raw));
          drawn = performance.now();
        }
      }
      if (choice?.finish_reason === "length") notes.push("cut off: no room for more tokens");
      if (event.usage) { usage = event.usage; notes.push(counts(event.usage, event.timings)); }
      if (follow) log.scrollTop = log.scrollHeight;
    }
    if (!ended) throw new Error("The connection broke off.");
  } catch (error) {
    if (running.signal.aborted) notes.unshift("stopped");
    else failed = error instanceof TypeError ? `The server cannot be reached (${error.message}).` : error.message;
  }
  said.replaceChildren(...markdown(raw));
  answer.classList.remove("waits");
  if (raw) mine.push({ role: "user", content: text }, { role: "assistant", content: raw });
  else if (mine === turns && !$("input").value) { $("input").value = text; grow(); question.classList.add("less"); }
  if (notes.length) {
    const note = add(answer, "note", "[" + notes.join(", ") + "]");
    if (usage) offerTokens(note, usage);
  }
  if (failed) add(answer, "error", failed).setAttribute("role", "alert");
  log.scrollTop = log.scrollHeight;
  running = null;
  $("send").hidden = false;
  $("stop").hidden = true;
}

export function examples() {
  const secret = about.api_key === "required", model = JSON.stringify(about.model);
  const body = JSON.stringify({ model: about.model, messages: [{ role: "user", content: "Hi" }] }).replaceAll("'", "'\\''");
  const bearer = secret ? " \\\n  -H \"Authorization: Bearer $MINISGL_API_KEY\"" : "";
  $("curl").textContent = `curl ${base}/v1/chat/completions \\\n  -H 'Content-Type: application/json'${bearer} \\\n  -d '${body}'`;
  $("sdk").textContent = (secret ? "import os\n" : "") + "from openai import OpenAI\n\n" +
    `client = OpenAI(base_url="${base}/v1",\n  api_key=${secret ? 'os.environ["MINISGL_API_KEY"]' : '"none"'})\n` +
    `answer = client.chat.completions.create(\n  model=${model},\n  messages=[{"role": "user", "content": "Hi"}])\n` +
    "print(answer.choices[0].message.content)";
}

function grow() { $("input").style.height = "auto"; $("input").style.height = $("input").scrollHeight + 2 + "px"; }

async function copy(button) {
  const pre = button.parentElement.nextElementSibling, before = button.textContent;
  try { await navigator.clipboard.writeText(pre.textContent); } catch {  // only for https and localhost
    getSelection().selectAllChildren(pre);
    document.execCommand("copy");
  }
  button.textContent = "Copied";
  setTimeout(() => { button.textContent = before; }, 1500);
}

const submit = () => send($("input").value.trim());
export const stop = () => running?.abort();
$("form").addEventListener("submit", (event) => { event.preventDefault(); submit(); });
$("input").addEventListener("input", grow);
$("input").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); submit(); }
});
$("stop").addEventListener("click", stop);
$("clear").addEventListener("click", () => {
  stop();
  turns = [];
  $("log").replaceChildren($("empty"));
  $("empty").hidden = false;
  $("input").focus();
});
for (const button of $("empty").querySelectorAll("button")) button.addEventListener("click", () => send(button.textContent));
for (const button of document.querySelectorAll(".copy")) button.addEventListener("click", () => copy(button));
