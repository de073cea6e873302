// Curves: one card per chart, all runs in it; hover shows the values of one step.

const AXIS_NAMES = { "rollout/step": "round", "train/step": "optimizer step", "eval/step": "round" };
let smoothing = 0;

function ticks(low, high, count) {
  const rough = (high - low) / Math.max(1, count);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.999);
  const first = Math.ceil(low / step - 1e-9);
  return Array.from({ length: Math.max(0, Math.floor(high / step + 1e-9) - first + 1) }, (_, i) => +((first + i) * step).toPrecision(12));
}
function logTicks(low, high) {
  const all = [];
  for (let p = Math.floor(low); p <= Math.ceil(high); p++) if (p >= low - 1e-9 && p <= high + 1e-9) all.push(p);
  return all.length > 1 ? all.filter((_, i) => i % Math.ceil(all.length / 5) === 0) : ticks(low, high, 3);
}
/** Exponential mean, as every smoothing of curves: 0 leaves them as they are. */
function smoothed(values, weight) {
  let mean = 0, total = 0;
  return values.map((value) => {
    if (typeof value !== "number") return value;
    mean = mean * weight + value * (1 - weight);
    total = total * weight + (1 - weight);
    return mean / total;
  });
}
function linePath(xs, ys, X, Y) {
  let path = "", pen = "M";
  xs.forEach((x, i) => {
    const y = typeof ys[i] === "number" ? Y(ys[i]) : NaN;
    if (isFinite(y)) { path += `${pen}${X(x).toFixed(1)} ${y.toFixed(1)}`; pen = "L"; } else pen = "M"; // a gap for NaN
  });
  return path;
}
/** The curves of a chart: [{run, name, x, y, dashed}], the chart's main name solid. */
function curvesOf(names) {
  return RUNS.flatMap((run, i) => names.filter((name) => run.series[name]).map((name) => ({
    run: i, name, dashed: names.indexOf(name) > 0, ...run.series[name],
  })));
}
function nearest(xs, x) {
  let low = 0, high = xs.length - 1;
  while (low < high) { const mid = (low + high) >> 1; if (xs[mid] < x) low = mid + 1; else high = mid; }
  return low > 0 && x - xs[low - 1] < xs[low] - x ? low - 1 : low;
}

function chartCard(chart) {
  const curves = curvesOf(chart.names);
  const numbers = curves.flatMap((curve) => curve.y.filter((y) => typeof y === "number"));
  const lowest = numbers.reduce((a, b) => Math.min(a, b), Infinity);
  const highest = numbers.reduce((a, b) => Math.max(a, b), -Infinity);
  let isLog = lowest > 0 && highest / lowest > 1000;
  const holder = el("div", { class: "plot" });
  const logButton = lowest > 0 ? el("button", { type: "button", "aria-pressed": String(isLog), onclick: () => {
    isLog = !isLog;
    logButton.setAttribute("aria-pressed", String(isLog));
    draw(holder.clientWidth);
  } }, "log") : null;
  const unit = curves[0].unit && curves[0].unit !== "1" ? ` (${curves[0].unit})` : "";
  const card = el("div", { class: "card" },
    el("div", { class: "chart-head" }, el("h3", {}, chart.title), logButton), el("div", { class: "sub" }, chart.note + unit), holder);
  const draw = (width) => holder.replaceChildren(chartSvg(curves, width, isLog, lowest, highest));
  onWidth(holder, draw);
  return card;
}

function chartSvg(curves, width, isLog, lowest, highest) {
  const height = 190, right = 10, top = 10, bottom = 22;
  if (!isFinite(lowest)) return svgEl("svg", { viewBox: `0 0 ${width} 40` }, svgEl("text", { x: 8, y: 24 }, "no finite value"));
  const scale = isLog ? Math.log10 : (y) => y;
  let low = scale(lowest), high = scale(highest);
  if (low === 0 && high === 0 && !isLog) high = 1;
  if (high - low < 1e-9 * Math.abs(high)) { const pad = Math.abs(high) * 0.1 || 1; low -= pad; high += pad; }
  const room = (high - low) * 0.06;
  low -= room * (lowest === 0 && !isLog ? 0 : 1); high += room;
  const marks = isLog ? logTicks(low, high) : ticks(low, high, 4);
  const labels = marks.map((mark) => num(isLog ? +(10 ** mark).toPrecision(3) : mark));
  const left = 14 + Math.max(...labels.map((label) => label.length), 2) * 6.4;
  const steps = curves.flatMap((curve) => [curve.x[0], curve.x[curve.x.length - 1]]);
  const first = Math.min(...steps), last = Math.max(...steps);
  const X = (x) => left + (last === first ? 0.5 : (x - first) / (last - first)) * (width - left - right);
  const Y = (y) => height - bottom - ((scale(y) - low) / (high - low)) * (height - top - bottom);
  const svg = svgEl("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": curves[0].name });
  marks.forEach((mark, i) => {
    const y = height - bottom - ((mark - low) / (high - low)) * (height - top - bottom);
    svg.append(svgEl("line", { class: "gridline", x1: left, x2: width - right, y1: y, y2: y }),
      svgEl("text", { x: left - 6, y: y + 4, "text-anchor": "end" }, labels[i]));
  });
  const axis = AXIS_NAMES[curves[0].axis];
  const xMarks = (last === first ? [first] : ticks(first, last, Math.max(2, Math.floor(width / 64)))).filter(Number.isInteger);
  xMarks.forEach((x) => svg.append(svgEl("text", { x: X(x), y: height - 6, "text-anchor": X(x) > width - 30 ? "end" : "middle" }, num(x))));
  for (const curve of curves) {
    const color = runColor(curve.run);
    const dash = curve.dashed ? "4 3" : null;
    const few = curve.x.length < 12;
    if (smoothing && !few) svg.append(svgEl("path", { d: linePath(curve.x, curve.y, X, Y), fill: "none", stroke: color, "stroke-width": 1, opacity: 0.25 }));
    const ys = few ? curve.y : smoothed(curve.y, smoothing);
    svg.append(svgEl("path", { d: linePath(curve.x, ys, X, Y), fill: "none", stroke: color, "stroke-width": curve.dashed ? 1.2 : 1.8, "stroke-dasharray": dash, "stroke-linejoin": "round", opacity: curve.dashed ? 0.75 : 1 }));
    if (few) curve.x.forEach((x, i) => typeof curve.y[i] === "number" && svg.append(svgEl("circle", { cx: X(x), cy: Y(curve.y[i]), r: 2.6, fill: color })));
  }
  const cursor = svgEl("g", {});
  svg.append(cursor);
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const x = first + ((event.clientX - box.left - left) / (width - left - right)) * (last - first);
    cursor.replaceChildren();
    let step = null;
    const rows = curves.map((curve) => {
      const i = nearest(curve.x, x);
      step = step === null || Math.abs(curve.x[i] - x) < Math.abs(step - x) ? curve.x[i] : step;
      if (typeof curve.y[i] === "number") cursor.append(svgEl("circle", { cx: X(curve.x[i]), cy: Y(curve.y[i]), r: 3.5, fill: runColor(curve.run) }));
      const name = RUNS.length > 1 ? RUNS[curve.run].name + (curve.dashed ? ` ${curve.name}` : "") : curve.name;
      return tipRow(runColor(curve.run), name, num(curve.y[i]));
    });
    cursor.append(svgEl("line", { class: "cursor", x1: X(step), x2: X(step), y1: top, y2: height - bottom }));
    showTip(event, el("div", {}, `${axis} ${num(step)}`), ...rows);
  });
  svg.addEventListener("pointerleave", () => { cursor.replaceChildren(); hideTip(); });
  return svg;
}

function sparkline(curve, color) {
  const ys = curve.y.filter((y) => typeof y === "number");
  if (ys.length < 2) return null;
  const low = ys.reduce((a, b) => Math.min(a, b)), high = ys.reduce((a, b) => Math.max(a, b));
  const first = curve.x[0], last = curve.x[curve.x.length - 1];
  const path = linePath(curve.x, curve.y, (x) => 1 + ((x - first) / (last - first || 1)) * 108, (y) => 20 - ((y - low) / (high - low || 1)) * 18);
  return svgEl("svg", { viewBox: "0 0 110 22", "aria-hidden": "true" }, svgEl("path", { d: path, fill: "none", stroke: color, "stroke-width": 1.2 }));
}

function curvesSection() {
  const charts = [];
  for (const run of RUNS) for (const chart of run.charts) {
    const known = charts.find((other) => other.title === chart.title);
    if (!known) charts.push({ ...chart, names: [...chart.names] });
    else known.names.push(...chart.names.filter((name) => !known.names.includes(name)));
  }
  if (!charts.length) return;
  const weights = [0, 0.8, 0.95];
  const tools = choice(["raw", "smooth", "smoother"], (i) => { smoothing = weights[i]; redraws.forEach((draw) => draw()); });
  const node = section("curves", "Curves", RUNS.length > 1 ? "" : "hover for values", tools);
  if (RUNS.length > 1) node.append(el("div", { class: "legend" }, RUNS.map((run, i) => el("span", {}, dot(runColor(i)), run.name))), el("p", {}));
  node.append(el("div", { class: "grid" }, charts.map(chartCard)));
}
