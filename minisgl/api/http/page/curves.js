// Curves of the last two minutes of the engine's clock, one point a second.
import { card, el, ms, num, percent, svg } from "./dom.js";
import { curve } from "./live.js";

// title, lines of [name, class, value of a row], how a value is written
const share = (a, b) => (b ? a / b : null);
const PLOTS = [
  ["tokens", "Tokens a second", [["generated", "s2", (r) => r[1]], ["prompt computed", "s0", (r) => r[2]]], num],
  ["ttft", "Time to first token", [["p50", "s0", (r) => r[5]], ["p95", "s1", (r) => r[6]]], ms],
  ["itl", "Between tokens", [["p50", "s0", (r) => r[7]], ["p95", "s1", (r) => r[8]]], ms],
  ["hits", "Prompt tokens from the cache", [["hit rate", "s3", (r) => share(r[4], r[3])]], percent],
  ["load", "Requests", [["running", "s2", (r) => r[9]], ["waiting", "s1", (r) => r[10]]], num],
  ["device", "Device", [["busy", "s2", (r) => share(r[11], r[11] + r[12])]], percent],
];
const W = 300, H = 100;
let boxes, pointed = null;

export function build(root) {
  boxes = PLOTS.map(([id, title]) => {
    const figures = el("div", { class: "figures" }), [box, body] = card(title), plot = svg("svg", { class: "plot", viewBox: `0 0 ${W} ${H}`, preserveAspectRatio: "none", role: "img" });
    box.id = "plot-" + id;
    const scale = el("span", { class: "scale" });
    body.append(figures, el("div", { class: "plotbox" }, plot, scale));
    plot.addEventListener("pointermove", (event) => { pointed = event.offsetX / plot.clientWidth; draw(); });
    plot.addEventListener("pointerleave", () => { pointed = null; draw(); });
    return [box, plot, figures, scale];
  });
  root.append(el("div", { class: "plots" }, ...boxes.map((b) => b[0])));
}

export function draw() {
  const rows = curve(), last = rows.at(-1)?.[0] ?? 0, from = Math.min(rows[0]?.[0] ?? 0, last - 20), span = Math.max(1, last - from);
  PLOTS.forEach(([, title, lines, write], i) => {
    const [box, plot, figures, scale] = boxes[i];
    const series = lines.map(([, , value]) => rows.map((r) => [r[0], value(r)]));
    const values = series.flat().map((p) => p[1]).filter((v) => v !== null), most = nice(Math.max(...values, write === percent ? 1 : 0.001));
    const parts = [0, 0.5, 1].map((f) => svg("line", { class: "grid", x1: 0, x2: W, y1: H - f * (H - 4) - 1, y2: H - f * (H - 4) - 1, "vector-effect": "non-scaling-stroke" }));
    lines.forEach(([, cls], k) => {
      let d = "", pen = false, before = null;
      for (const [t, v] of series[k]) {
        if (v === null) { pen = false; before = t; continue; }
        if (before !== null && t - before > 1 && k >= 0) pen = false;
        const x = ((t - from) / span) * W, y = H - 1 - (v / most) * (H - 4);
        d += pen ? `L${x.toFixed(1)} ${y.toFixed(1)}` : `M${x.toFixed(1)} ${y.toFixed(1)}h.01`;
        pen = true;
        before = t;
      }
      parts.push(svg("path", { class: cls, d: d || "M0 0" }));
    });
    plot.replaceChildren(...parts);
    const at = pointed === null ? rows.findLast((r) => r[0] < last) ?? rows.at(-1) : rows.reduce((best, r) => (Math.abs((r[0] - from) / span - pointed) < Math.abs(((best?.[0] ?? -1e9) - from) / span - pointed) ? r : best), null);
    if (!rows.length) {
      figures.replaceChildren("Nothing has run since the page looks on.");
      plot.setAttribute("aria-label", `${title}: nothing has run yet`);
      scale.textContent = "";
      return;
    }
    figures.replaceChildren(...lines.flatMap(([name, cls, value]) => [el("i", { class: "key " + cls }), `${name} ${write(at ? value(at) : null)}  `]));
    figures.title = `scale up to ${write(most)}; ${at ? `${last - at[0]} s before the last second` : "nothing yet"}`;
    plot.setAttribute("aria-label", `${title}: ${figures.textContent}`);
    box.dataset.most = most;
    scale.textContent = write(most);
  });
}

function nice(x) {
  const power = 10 ** Math.floor(Math.log10(x)), lead = x / power;
  return (lead <= 1 ? 1 : lead <= 2 ? 2 : lead <= 5 ? 5 : 10) * power;
}
