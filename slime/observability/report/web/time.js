// Seconds per phase and round, stacked; and the timeline of all roles.

const COLORS = {
  rollout: "#3b82f6", generate: "#3b82f6", eval: "#8b5cf6", rollout_data: "#22a6c3", put_batches: "#67c7dc",
  log_probs: "#eab308", ref_log_probs: "#c99a0a", actor_train: "#f97316", train_step: "#fb9a55", "train: rest": "#fdba74", train: "#f3b98a",
  advantages: "#a3b31f", update_weights: "#10a37f", pause: "#7fa99b", send: "#2bbd93", verify: "#14867a", resume: "#8fd3bf",
  reward: "#84cc16", data: "#22a6c3", sync: "#10a37f", offload: "#7c8fa6",
  save: "#ec4899", save_checkpoint: "#ec4899", save_hf: "#f48fbd", load_model: "#8795a8", other: "#a8b3c1",
};
const SPARE = ["#64748b", "#b45309", "#0e7490", "#a21caf", "#4d7c0f", "#be123c"];
const isWait = (name) => name.startsWith("wait");
function phaseColor(name) {
  if (COLORS[name]) return COLORS[name];
  if (isWait(name) || name === "idle") return css("--hatch");
  return SPARE[[...name].reduce((sum, c) => sum + c.codePointAt(0), 0) % SPARE.length];
}
/** Colours of these names, all waiting as one, in the order of the table above. */
function legend(names) {
  const order = [...Object.keys(COLORS)], place = (name) => order.indexOf(name) < 0 ? order.length : order.indexOf(name);
  const shown = names.filter((name) => !isWait(name)).sort((a, b) => place(a) - place(b));
  const chips = shown.map((name) => el("span", {}, dot(phaseColor(name)), name));
  if (names.some(isWait)) chips.push(el("span", {}, dot(phaseColor("wait")), "waiting for another role"));
  return el("div", { class: "legend" }, chips);
}

function phaseSvg(phases, width) {
  const height = 230, left = 52, right = 10, top = 10, bottom = 22, count = phases.first.length;
  const sums = phases.total.map((total, i) => Math.max(total, phases.parts.reduce((sum, part) => sum + part.seconds[i], 0)));
  // One slow round, the first often, must not flatten all others: the axis ends a little above the 98th percentile.
  const sorted = [...sums].sort((a, b) => a - b);
  const high = Math.min(sorted[count - 1], sorted[Math.floor((count - 1) * 0.98)] * 1.6) * 1.05 || 1;
  const X = (i) => left + (i / count) * (width - left - right);
  const Y = (value) => height - bottom - Math.min(1, value / high) * (height - top - bottom);
  const svg = svgEl("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": "seconds per round" });
  for (const mark of ticks(0, high, 4)) svg.append(
    svgEl("line", { class: "gridline", x1: left, x2: width - right, y1: Y(mark), y2: Y(mark) }),
    svgEl("text", { x: left - 6, y: Y(mark) + 4, "text-anchor": "end" }, seconds(mark)));
  const gap = (width - left - right) / count > 4 ? 1 : 0;
  for (let i = 0; i < count; i++) {
    let sum = 0;
    for (const part of phases.parts) {
      const y = Y(sum + part.seconds[i]), h = Y(sum) - y;
      sum += part.seconds[i];
      if (h > 0.05) svg.append(svgEl("rect", { x: X(i), y, width: Math.max(0.5, X(i + 1) - X(i) - gap), height: h, fill: phaseColor(part.name) }));
    }
  }
  const every = Math.max(1, Math.ceil(count / Math.max(2, Math.floor(width / 90))));
  for (let i = 0; i < count; i += every) svg.append(svgEl("text", { x: (X(i) + X(i + 1)) / 2, y: height - 6, "text-anchor": "middle" }, num(phases.first[i])));
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const i = Math.min(count - 1, Math.max(0, Math.floor(((event.clientX - box.left - left) / (width - left - right)) * count)));
    const rounds = phases.first[i] === phases.last[i] ? `round ${phases.first[i]}` : `rounds ${phases.first[i]} to ${phases.last[i]}, mean`;
    showTip(event, el("div", {}, `${rounds}: ${seconds(phases.total[i])}`), ...phases.parts.filter((part) => part.seconds[i] > 0).map((part) => tipRow(phaseColor(part.name), part.name, seconds(part.seconds[i]))));
  });
  svg.addEventListener("pointerleave", hideTip);
  return svg;
}
/** Shares of the whole run: a bar and the numbers of each side. */
function sharesTable(sides) {
  const order = sides.flatMap((side) => side.shares.map((part) => part.name)).filter((name, i, all) => all.indexOf(name) === i);
  const cell = (side, name) => side.shares.find((part) => part.name === name);
  const percent = (part) => part ? `${num(+(100 * part.share).toPrecision(3))} %` : "";
  const bar = (side) => el("div", { class: "bar" }, side.shares.map((part) => {
    const piece = painted(el("span", { title: `${part.name}: ${percent(part)}, ${seconds(part.seconds)}` }), phaseColor(part.name));
    piece.style.width = `${100 * part.share}%`;
    return piece;
  }));
  return el("table", {}, el("thead", {}, el("tr", {}, el("th", {}, "side"), el("th", { class: "wide" }, ""), order.map((name) => el("th", { class: "num" }, dot(phaseColor(name)), name)))),
    el("tbody", {}, sides.map((side) => el("tr", {}, el("td", {}, side.side), el("td", { class: "wide" }, bar(side)), order.map((name) => el("td", { class: "num" }, percent(cell(side, name))))))));
}
function phasesSection() {
  if (!RUNS.some((run) => run.phases.some((side) => side.first.length))) return;
  const holder = el("div"), below = el("div"), table = el("div", { class: "card scroll" }), tools = el("span");
  let phases, sides;
  const draw = (width) => {
    holder.replaceChildren(phases.first.length ? phaseSvg(phases, width) : el("p", { class: "sub" }, "This run has no times."));
    below.replaceChildren(legend(phases.parts.map((part) => part.name)));
  };
  const load = (i) => {
    sides = RUNS[i].phases;
    phases = sides[0];
    table.replaceChildren(sharesTable(sides));
    tools.replaceChildren(sides.length > 1 ? choice(sides.map((side) => side.side), (j) => { phases = sides[j]; draw(holder.clientWidth); }) : "");
    draw(holder.clientWidth);
  };
  const node = section("time", "Time", "where the time of each round went: for the driver, a training rank, the engines", runChoice(load), tools);
  node.append(el("div", { class: "card" }, holder, below), table);
  load(0);
  onWidth(holder, draw);
}

/** Rows of a role: a span inside another goes below it, one that overlaps beside it. */
function stack(spans) {
  const ends = [];
  let depth = 1;
  const placed = spans.map((span) => {
    const end = span[2] + span[3];
    let row = 0;
    while (row < ends.length && ends[row] > span[2] + 1e-6) row++;
    ends[row] = end;
    for (let below = row + 1; below < ends.length; below++) ends[below] = Math.min(ends[below], span[2]);
    depth = Math.max(depth, row + 1);
    return { span, row };
  });
  return { placed, depth };
}

function timelineSection() {
  if (!RUNS.some((run) => run.timeline.spans.length)) return;
  const canvas = el("canvas", { id: "gantt" }), mini = el("canvas", { id: "mini" });
  const from = el("input", { type: "number", "aria-label": "first round", min: 0 }), to = el("input", { type: "number", "aria-label": "last round", min: 0 });
  const ROW = 17, GAP = 12, TOP = 22;
  let line, lanes, view, full, width = 0, hits = [];

  function load(i) {
    line = RUNS[i].timeline;
    let y = TOP;
    lanes = line.roles.map((role, r) => {
      const { placed, depth } = stack(line.spans.filter((span) => span[0] === r));
      const lane = { role, placed, top: y, height: depth * ROW };
      y += depth * ROW + GAP + 14;
      return lane;
    });
    full = [0, line.spans.reduce((end, span) => Math.max(end, span[2] + span[3]), 1e-3)];
    canvas.style.height = `${y}px`;
    const rounds = line.rounds, middle = Math.floor(rounds.length / 2);
    if (rounds.length) showRounds(rounds[Math.max(0, middle - 1)][0], rounds[Math.min(rounds.length - 1, middle + 1)][0]);
    else { view = [...full]; draw(); }
    names.replaceChildren(legend(line.names));
  }
  function showRounds(a, b) {
    const inside = line.rounds.filter((round) => round[0] >= a && round[0] <= b);
    if (!inside.length) return;
    const start = Math.min(...inside.map((round) => round[1])), end = Math.max(...inside.map((round) => round[2]));
    setView(start - (end - start) * 0.01, end + (end - start) * 0.03);
    from.value = a; to.value = b;
  }
  function setView(start, end) {
    const length = Math.min(full[1] - full[0], Math.max(0.002, end - start));
    start = Math.min(Math.max(full[0], start), full[1] - length);
    view = [start, start + length];
    draw();
  }
  const zoom = (factor, at = (view[0] + view[1]) / 2) => setView(at - (at - view[0]) * factor, at + (view[1] - at) * factor);
  const move = (share) => setView(view[0] + (view[1] - view[0]) * share, view[1] + (view[1] - view[0]) * share);
  const moveRounds = (sign) => {
    const a = Number(from.value), b = Number(to.value), size = (b - a + 1) * sign;
    showRounds(a + size, b + size);
  };
  function context(node, height) {
    const ratio = devicePixelRatio || 1;
    node.width = width * ratio; node.height = height * ratio;
    const c = node.getContext("2d");
    c.setTransform(ratio, 0, 0, ratio, 0, 0);
    c.font = "11px system-ui, sans-serif";
    return c;
  }
  const X = (t) => ((t - view[0]) / (view[1] - view[0])) * width;
  function draw() {
    if (!width || !view) return;
    const height = parseFloat(canvas.style.height), c = context(canvas, height);
    const ink = css("--ink"), soft = css("--soft"), grid = css("--grid");
    c.clearRect(0, 0, width, height);
    const marks = ticks(view[0], view[1], Math.max(2, width / 120)), step = marks.length > 1 ? marks[1] - marks[0] : 1;
    const digits = Math.max(0, Math.ceil(-Math.log10(step) + 0.3));
    for (const mark of marks) {
      c.fillStyle = grid; c.fillRect(X(mark), TOP - 6, 1, height);
      c.fillStyle = soft;
      if (X(mark) < width - 50) c.fillText(step < 10 && mark < 1e4 ? `${mark.toFixed(Math.min(4, digits))} s` : seconds(mark), X(mark) + 4, 11);
    }
    hits = [];
    for (const lane of lanes) {
      c.fillStyle = soft; c.fillText(lane.role, 4, lane.top + 9);
      let lastX = [], lastName = [];
      for (const { span, row } of lane.placed) {
        const x = X(span[2]), w = X(span[2] + span[3]) - x;
        if (x > width || x + w < 0) continue;
        const name = line.names[span[1]], y = lane.top + 14 + row * ROW;
        if (w < 0.4 && lastX[row] >= x - 0.4 && lastName[row] === name) continue; // thousands in one pixel
        lastX[row] = x + w; lastName[row] = name;
        c.globalAlpha = isWait(name) ? 0.55 : 1;
        c.fillStyle = phaseColor(name);
        c.fillRect(x, y, Math.max(0.7, w - (w > 3 ? 0.8 : 0)), ROW - 2);
        c.globalAlpha = 1;
        hits.push([x, y, Math.max(3, w), ROW - 2, span]);
        const shown = Math.min(x + w, width) - Math.max(x, 0);
        if (shown > 34) {
          c.save(); c.beginPath(); c.rect(Math.max(x, 0), y, shown - 4, ROW); c.clip();
          c.fillStyle = isWait(name) ? ink : "#10161f";
          c.fillText(name, Math.max(x, 0) + 5, y + 11.5); c.restore();
        }
      }
    }
    drawMini(grid);
  }
  function drawMini(grid) {
    const c = context(mini, 30), M = (t) => ((t - full[0]) / (full[1] - full[0])) * width;
    c.fillStyle = grid; c.fillRect(0, 0, width, 30);
    lanes.slice(0, 8).forEach((lane, i) => {
      const h = 26 / Math.min(8, lanes.length), last = {};
      for (const { span, row } of lane.placed) {
        const name = line.names[span[1]], x = M(span[2]);
        if (row > 0 || isWait(name) || last[name] > x) continue;
        c.fillStyle = phaseColor(name);
        const w = Math.max(0.6, M(span[2] + span[3]) - x);
        last[name] = x + w - 0.3;
        c.fillRect(x, 2 + i * h, w, h - 1);
      }
    });
    c.strokeStyle = css("--ink"); c.lineWidth = 1.5;
    c.strokeRect(Math.max(1, M(view[0])), 1, Math.max(5, M(view[1]) - M(view[0])) - 1, 28);
  }
  // Drag and pinch; the wheel zooms with Ctrl, so that the page can still be scrolled.
  const pointers = new Map();
  canvas.addEventListener("pointerdown", (event) => { canvas.setPointerCapture(event.pointerId); pointers.set(event.pointerId, event.offsetX); });
  canvas.addEventListener("pointermove", (event) => {
    const time = (x) => view[0] + (x / width) * (view[1] - view[0]);
    if (!pointers.has(event.pointerId)) { hover(event); return; }
    hideTip();
    const before = [...pointers.values()];
    pointers.set(event.pointerId, event.offsetX);
    const after = [...pointers.values()];
    if (after.length === 1) { const by = time(before[0]) - time(after[0]); setView(view[0] + by, view[1] + by); return; }
    const factor = Math.abs(before[0] - before[1]) / Math.max(8, Math.abs(after[0] - after[1]));
    zoom(factor, time((after[0] + after[1]) / 2));
  });
  for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, (event) => { pointers.delete(event.pointerId); if (name === "pointerup") hover(event); });
  canvas.addEventListener("pointerleave", hideTip);
  canvas.addEventListener("dblclick", (event) => zoom(0.4, view[0] + (event.offsetX / width) * (view[1] - view[0])));
  canvas.addEventListener("wheel", (event) => {
    if (!event.ctrlKey && !event.metaKey) return;
    event.preventDefault();
    zoom(event.deltaY > 0 ? 1.25 : 0.8, view[0] + (event.offsetX / width) * (view[1] - view[0]));
  }, { passive: false });
  mini.addEventListener("pointerdown", (event) => { mini.setPointerCapture(event.pointerId); jump(event); });
  mini.addEventListener("pointermove", (event) => { if (event.buttons) jump(event); });
  function jump(event) {
    const at = full[0] + (event.offsetX / width) * (full[1] - full[0]), half = (view[1] - view[0]) / 2;
    setView(at - half, at + half);
  }
  function hover(event) {
    const hit = hits.findLast(([x, y, w, h]) => event.offsetX >= x && event.offsetX <= x + w && event.offsetY >= y && event.offsetY <= y + h);
    if (!hit) { hideTip(); return; }
    const span = hit[4], name = line.names[span[1]];
    showTip(event, tipRow(phaseColor(name), name, seconds(span[3])), el("div", {}, line.roles[span[0]] + (span[4] === null ? "" : `, round ${span[4]}`)), el("div", {}, `begins at ${seconds(span[2])}`));
  }
  const button = (label, title, act) => el("button", { type: "button", title, "aria-label": title, onclick: act }, label);
  const chosen = () => showRounds(Number(from.value), Number(to.value));
  from.addEventListener("change", chosen); to.addEventListener("change", chosen);
  const names = el("div");
  const tools = [runChoice(load), el("label", {}, "rounds ", from), el("label", {}, "to ", to),
    el("span", { class: "group" }, button("‹", "rounds before", () => moveRounds(-1)), button("›", "rounds after", () => moveRounds(1))),
    el("span", { class: "group" }, button("+", "zoom in", () => zoom(0.5)), button("−", "zoom out", () => zoom(2)), button("all", "whole run", () => setView(...full)))];
  const node = section("timeline", "Timeline", "drag to move, pinch or Ctrl + wheel to zoom; gaps are waiting");
  node.append(el("div", { class: "head" }, tools), el("div", { class: "card" }, mini, canvas, names));
  canvas.tabIndex = 0;
  canvas.addEventListener("keydown", (event) => {
    const act = { ArrowLeft: () => move(-0.2), ArrowRight: () => move(0.2), "+": () => zoom(0.7), "-": () => zoom(1.4) }[event.key];
    if (act) { event.preventDefault(); act(); }
  });
  load(Math.max(0, RUNS.findIndex((run) => run.timeline.spans.length)));
  onWidth(canvas.parentElement, (outer) => {
    const style = getComputedStyle(canvas.parentElement);
    width = outer - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight);
    draw();
  });
}
