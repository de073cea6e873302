// Samples with their tokens, coloured by how likely the engine held them.

function tokenNode(piece, i, sample) {
  const node = el("span", { class: "token", "data-i": i });
  const masked = sample.removed || (sample.mask && sample.mask[i] === 0);
  if (masked) node.classList.add("masked");
  else if (sample.log_probs && typeof sample.log_probs[i] === "number") {
    node.style.background = `rgb(234 88 12 / ${(Math.min(1, 1 - Math.exp(sample.log_probs[i])) * 78).toFixed(0)}%)`;
  }
  // A line break is shown as a sign too: a token of its own would have no width.
  piece.split("\n").forEach((part, k) => {
    if (k > 0) node.append(el("span", { class: "newline" }, "↵"), "\n");
    node.append(part);
  });
  return node;
}
function tokensNode(sample) {
  const node = el("div", { class: "text mono" }, sample.pieces.map((piece, i) => tokenNode(piece, i, sample)));
  if (sample.length > sample.pieces.length) node.append(el("span", { class: "sub" }, ` ... (${num(sample.length - sample.pieces.length)} more tokens)`));
  const show = (event) => {
    const token = event.target.closest(".token");
    if (!token) { hideTip(); return; }
    const i = Number(token.dataset.i), logProb = sample.log_probs ? sample.log_probs[i] : null;
    const rows = [el("div", {}, `${JSON.stringify(sample.pieces[i])}  token ${i + 1} of ${num(sample.length)}`)];
    if (typeof logProb === "number") rows.push(tipRow(null, "log-prob", num(logProb)), tipRow(null, "p", `${+(Math.exp(logProb) * 100).toPrecision(3)} %`));
    if (sample.mask && sample.mask[i] === 0) rows.push(el("div", {}, "masked: does not train"));
    const span = (sample.spans || []).filter(([first]) => first <= i).pop();
    if (span && span[1]) rows.push(tipRow(null, "weights", span[1]));
    showTip(event, ...rows);
  };
  node.addEventListener("pointermove", show);
  node.addEventListener("pointerdown", show);
  node.addEventListener("pointerleave", hideTip);
  return node;
}
function sampleNode(sample) {
  const known = (sample.log_probs || []).filter((value, i) => typeof value === "number" && !(sample.mask && sample.mask[i] === 0));
  const mean = known.length ? known.reduce((a, b) => a + b, 0) / known.length : null;
  const facts = [["reward", num(sample.reward)], ["status", sample.status || "-"], ["label", sample.label ?? "-"], ["tokens", num(sample.length)],
    ["mean log-prob", num(mean)], ["weights", [...new Set(sample.versions)].join(", ") || "-"], ["index", String(sample.index ?? "-")], ["group", String(sample.group ?? "-")]];
  if (sample.removed) facts.push(["removed", "trains on no token"]);
  const response = sample.pieces ? tokensNode(sample) : el("div", { class: "text mono" }, sample.response);
  const scale = !sample.pieces ? el("div", { class: "legend" }, "This run's samples hold no tokens: it was made by an older slime.")
    : el("div", { class: "legend" }, el("span", {}, "probability 1", el("span", { class: "scale" }), "0"), el("span", {}, el("span", { class: "dot masked" }), "masked"));
  return el("div", { class: "sample" },
    el("div", {}, el("h3", {}, "Prompt"), el("div", { class: "text prompt mono" }, sample.prompt), el("h3", {}, "Response"), response, scale),
    el("dl", {}, facts.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)])));
}
const inShort = (text) => text.length > 16 ? `${text.slice(0, 15)}…` : text; // a reward may be a whole dict
function samplesSection() {
  if (!RUNS.some((run) => run.samples.length)) return;
  const select = el("select", { "aria-label": "round" }), chips = el("div", { class: "chips" }), body = el("div");
  let rounds = [], at = 0, picked = 0;
  const title = (round) => `${round.evaluation ? "evaluation at" : "round"} ${round.rollout_id}`;
  function load(i) {
    const before = rounds[at] && title(rounds[at]);
    rounds = RUNS[i].samples;
    select.replaceChildren(...rounds.map((round, k) => el("option", { value: k }, title(round))));
    const same = rounds.findIndex((round) => title(round) === before);
    const last = rounds.findLastIndex((round) => !round.evaluation);
    pick(same >= 0 ? same : Math.max(0, last));
  }
  function pick(round) {
    if (!rounds.length) { chips.replaceChildren(); body.replaceChildren(el("p", { class: "sub" }, "This run has no samples.")); return; }
    at = Math.min(rounds.length - 1, Math.max(0, round));
    select.value = String(at);
    show(Math.min(picked, Math.max(0, rounds[at].samples.length - 1)));
  }
  function show(index) {
    picked = index;
    const samples = rounds[at].samples;
    chips.replaceChildren(...samples.map((sample, k) => el("button", { type: "button", "aria-pressed": String(k === index), onclick: () => show(k) },
      `sample ${sample.index ?? k}`, el("small", {}, inShort(num(sample.reward))))));
    body.replaceChildren(samples.length ? sampleNode(samples[index]) : el("p", { class: "sub" }, "No whole sample in this file."));
  }
  select.addEventListener("change", () => pick(Number(select.value)));
  const step = (by, label, name) => el("button", { type: "button", "aria-label": name, onclick: () => pick(at + by) }, label);
  const node = section("samples", "Samples", "the first of each round; hover over a token for its log-prob", runChoice(load), el("span", { class: "group" }, step(-1, "‹", "round before"), step(1, "›", "round after")), select);
  node.append(el("div", { class: "card" }, chips, body));
  load(0);
}
