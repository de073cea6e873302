// The page from top to bottom.

function headerPart() {
  const names = RUNS.flatMap((run, i) => [i ? el("span", { class: "versus" }, "vs") : null, RUNS.length > 1 ? dot(runColor(i)) : null, run.name]);
  const lines = RUNS.map((run) => {
    const took = run.facts.began ? `${date(run.facts.began)}, ${seconds(run.facts.ended - run.facts.began)}` : "no metrics yet";
    return el("div", { class: "sub" }, [RUNS.length > 1 ? `${run.name}: ` : "", run.model || "unknown model", " · ", took, run.facts.is_fresh ? " · wrote within two minutes of this report" : ""].join(""));
  });
  const toggle = el("button", { type: "button", title: "light or dark", "aria-label": "light or dark", onclick: () => setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark") }, "◐");
  document.getElementById("top").append(el("div", {}, el("h1", {}, names), lines), toggle);
}

const meanOf = (values) => { const known = values.filter((v) => typeof v === "number"); return known.length ? known.reduce((a, b) => a + b, 0) / known.length : null; };
function tile(name, value, note) {
  const rows = RUNS.map((run, i) => {
    const shown = value(run);
    return shown === null ? null : el("div", { class: "row" }, RUNS.length > 1 ? dot(runColor(i)) : null, el("b", {}, shown), note && note(run) ? el("small", {}, note(run)) : null);
  });
  return rows.some((row) => row) ? el("div", { class: "card tile" }, el("span", { class: "sub" }, name), rows) : null;
}
function overviewPart() {
  const node = section("overview", "Overview", "");
  const of = (name, pick) => (run) => run.series[name] ? num(pick(run.series[name].y)) : null;
  const tail = (y) => meanOf(y.slice(-Math.max(1, Math.min(10, Math.ceil(y.length / 10)))));
  const start = (y) => meanOf(y.slice(0, Math.max(1, Math.min(10, Math.ceil(y.length / 10)))));
  const evals = [...new Set(RUNS.flatMap((run) => run.facts.evals))];
  const tiles = [
    tile("rounds", (run) => num(run.facts.rounds), (run) => run.facts.planned ? `of ${num(run.facts.planned)}` : ""),
    tile("reward, last rounds", of("rollout/raw_reward", tail), (run) => run.series["rollout/raw_reward"] ? `from ${num(start(run.series["rollout/raw_reward"].y))}` : ""),
    ...evals.slice(0, 3).map((name) => tile(name, of(name, (y) => y[y.length - 1]), (run) => run.series[name] ? `best ${num(run.series[name].y.filter((y) => typeof y === "number").reduce((a, b) => Math.max(a, b), -Infinity))}` : "")),
    tile("response tokens, mean", of("rollout/response_len/mean", tail)),
    tile("trainer against engine", of("train/train_rollout_logprob_abs_diff", (y) => y.reduce((a, b) => Math.max(a, b))), () => "nats at most"),
    tile("round, mean", (run) => run.series["perf/step_time"] ? seconds(meanOf(run.series["perf/step_time"].y)) : null),
    tile("tokens/s per slot, mean", of("perf/tokens_per_gpu_per_sec", meanOf)),
    tile("restarts", (run) => run.ledger ? num(Math.max(0, run.ledger.num_attempts - 1)) : null),
  ];
  node.append(el("div", { class: "tiles" }, tiles));
  const lines = RUNS.flatMap((run) => run.notes.map((note) => RUNS.length > 1 ? `${run.name}: ${note}` : note));
  if (lines.length) node.append(el("div", { class: "card notes" }, "About this page", el("ul", {}, lines.map((line) => el("li", {}, line)))));
}

function historyPart() {
  const runs = RUNS.filter((run) => run.ledger);
  if (!runs.length) return;
  const node = section("history", "History", "from the run's ledger: each start of the run is an attempt");
  for (const run of runs) {
    const book = run.ledger;
    const state = book.ended ? "came to its end" : "has not come to its end";
    const counts = Object.entries(book.counts).map(([event, count]) => `${num(count)} ${event}`).join(", ");
    const columns = [...new Set(book.attempts.flatMap((attempt) => Object.keys(attempt)))];
    const shown = (key, value) => key === "time" && Number(value) ? date(Number(value)) : value ?? "";
    node.append(el("div", { class: "card scroll" },
      el("p", {}, `${run.name} ${state}. Rounds: ${num(book.rounds)}, attempts: ${num(book.num_attempts)}, rounds made again after a restart: ${num(book.redone)}. Events: ${counts}.`),
      el("table", {}, el("thead", {}, el("tr", {}, columns.map((name) => el("th", {}, name)))),
        el("tbody", {}, book.attempts.map((attempt) => el("tr", {}, columns.map((name) => el("td", {}, shown(name, attempt[name])))))))));
  }
}

function metricsPart() {
  const names = [...new Set(RUNS.flatMap((run) => Object.keys(run.series)))].sort();
  if (!names.length) return;
  const body = el("tbody");
  const filter = el("input", { type: "search", placeholder: "filter", "aria-label": "filter metrics", oninput: () => draw() });
  function draw() {
    const words = filter.value.toLowerCase().split(/\s+/);
    body.replaceChildren(...names.filter((name) => words.every((word) => name.toLowerCase().includes(word))).map((name) => {
      const known = RUNS.find((run) => run.series[name]).series[name];
      return el("tr", {}, el("td", {}, el("code", {}, name)), RUNS.map((run) => el("td", { class: "num" }, run.series[name] ? num(run.series[name].last) : "-")),
        el("td", { class: "wide" }, known.unit === "1" ? "" : known.unit),
        el("td", { class: "wide" }, RUNS.map((run, i) => run.series[name] ? sparkline(run.series[name], runColor(i)) : null)), el("td", { class: "wide sub" }, known.meaning));
    }));
  }
  const heads = RUNS.length > 1 ? RUNS.map((run, i) => el("th", { class: "num" }, dot(runColor(i)), run.name)) : [el("th", { class: "num" }, "last value")];
  section("metrics", "Metrics", "the last value of each", filter).append(el("div", { class: "card scroll long" },
    el("table", {}, el("thead", {}, el("tr", {}, el("th", {}, "name"), heads, el("th", { class: "wide" }, "unit"), el("th", { class: "wide" }, "course"), el("th", { class: "wide" }, "meaning"))), body)));
  draw();
  redraws.push(draw);
}

function flagsPart() {
  const tables = RUNS.map((run) => new Map(run.flags.map((flag) => [flag.name, flag])));
  const names = [...new Set(tables.flatMap((table) => [...table.keys()]))].sort();
  if (!names.length) return;
  const changed = (name) => tables.some((table) => table.get(name)?.changed);
  const differs = (name) => new Set(tables.map((table) => table.get(name)?.value)).size > 1;
  const kinds = [["changed", changed], ["all", () => true]];
  if (RUNS.length > 1) kinds.unshift(["different", differs]);
  const body = el("tbody");
  const draw = (kind) => {
    const shown = names.filter(kinds[kind][1]);
    body.replaceChildren(...(shown.length ? shown.map((name) => el("tr", {}, el("td", {}, el("code", {}, name)),
      tables.map((table) => el("td", { class: "value mono" }, el("div", {}, table.get(name)?.value ?? "-"))),
      el("td", { class: "value mono sub wide" }, tables.map((table) => table.get(name)?.default).find((value) => value !== undefined) ?? "")))
      : [el("tr", {}, el("td", {}, "none"))]));
  };
  const heads = RUNS.length > 1 ? RUNS.map((run, i) => el("th", {}, dot(runColor(i)), run.name)) : [el("th", {}, "value")];
  section("flags", "Flags", RUNS.length > 1 ? "where the runs differ, what differs from the default, or all" : "what differs from the default, or all",
    choice(kinds.map(([name]) => name), draw)).append(el("div", { class: "card scroll long" },
    el("table", {}, el("thead", {}, el("tr", {}, el("th", {}, "flag"), heads, el("th", { class: "wide" }, "default"))), body)));
  draw(0);
}

headerPart();
overviewPart();
curvesSection();
phasesSection();
timelineSection();
samplesSection();
historyPart();
metricsPart();
flagsPart();
document.getElementById("main").append(el("footer", {}, `Made by slime report on ${date(DATA.made)} from ${RUNS.map((run) => run.path).join(", ")}. Times of several machines are as their clocks say.`));
addEventListener("scroll", hideTip, { passive: true });
