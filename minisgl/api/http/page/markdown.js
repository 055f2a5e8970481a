// A little Markdown: paragraphs, headings, lists, code, bold, italics.  Builds nodes; text stays text.
import { el } from "./dom.js";

const INLINE = /(`[^`\n]+`)|(\*\*[^*\n]+\*\*)|(\*[^*\s][^*\n]*\*)/;

function inline(text) {
  const out = [];
  for (let rest = text; rest; ) {
    const found = INLINE.exec(rest);
    if (!found) { out.push(rest); break; }
    if (found.index) out.push(rest.slice(0, found.index));
    if (found[1]) out.push(el("code", {}, found[1].slice(1, -1)));
    else if (found[2]) out.push(el("strong", {}, found[2].slice(2, -2)));
    else out.push(el("em", {}, found[3].slice(1, -1)));
    rest = rest.slice(found.index + found[0].length);
  }
  return out;
}

export function markdown(text) {
  const blocks = [], lines = text.split("\n");
  let paragraph = [];
  const flush = () => { if (paragraph.length) blocks.push(el("p", {}, ...inline(paragraph.join("\n")))); paragraph = []; };
  for (let i = 0; i < lines.length; i++) {
    const line = lines[i], item = /^\s*([-*]|\d+[.)])\s+(.*)$/.exec(line);
    if (line.startsWith("```")) {
      flush();
      const code = [];
      while (++i < lines.length && !lines[i].startsWith("```")) code.push(lines[i]);
      blocks.push(el("pre", { tabindex: 0 }, el("code", {}, code.join("\n"))));
    } else if (/^#{1,6}\s/.test(line)) {
      flush();
      blocks.push(el("h3", {}, ...inline(line.replace(/^#+\s+/, ""))));
    } else if (item) {
      flush();
      const tag = /\d/.test(item[1]) ? "ol" : "ul";
      if (blocks.at(-1)?.tagName !== tag.toUpperCase()) blocks.push(el(tag, tag === "ol" ? { start: parseInt(item[1], 10) } : {}));
      blocks.at(-1).append(el("li", {}, ...inline(item[2])));
    } else if (!line.trim()) flush();
    else paragraph.push(line);
  }
  flush();
  return blocks;
}
