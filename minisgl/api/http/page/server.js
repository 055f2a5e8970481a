// The server behind the page: where it is, its key, its streams.
import { $ } from "./dom.js";

export const base = location.origin + location.pathname.replace(/\/(v1\/?)?$/, "");
export const key = () => $("key").value.trim();
export const headers = (more = {}) => (key() ? { ...more, Authorization: "Bearer " + key() } : more);

// The data of server-sent events.
export async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = "", done = false, value; !done; ) {
    ({ done, value } = await reader.read());
    const lines = (rest + (done ? "\n" : value)).split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
  }
}

// What an answer that is no success says: {message, code}.
export async function refusal(response) {
  const text = await response.text();
  try { return JSON.parse(text).error; } catch { return { message: `${response.status} ${response.statusText} ${text.slice(0, 500)}` }; }
}
