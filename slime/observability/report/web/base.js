"use strict";
// Prompts and answers are text from outside: everything enters the page as a text node or through
// attributes set here, never as markup (a test looks for the calls that would).

const DATA = JSON.parse(document.getElementById("data").textContent);
const RUNS = DATA.runs;
const SVG = "http://www.w3.org/2000/svg";
const redraws = []; // called when the width or the theme changes

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value);
  }
  for (const child of children.flat(2)) if (child !== null && child !== undefined) node.append(child);
  return node;
}
const el = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const svgEl = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const runColor = (i) => css(`--run${i % 6}`);
const painted = (node, color) => { node.style.background = color; return node; };
const dot = (color) => painted(el("span", { class: "dot" }), color);

function num(value) {
  if (value === null || value === undefined) return "-";
  if (typeof value === "string") return value; // NaN and infinities come as text
  const size = Math.abs(value);
  if (value !== 0 && (size < 1e-3 || size >= 1e7)) return value.toExponential(2).replace(/\.?0+e/, "e").replace("e+", "e");
  if (Number.isInteger(value)) return value.toLocaleString("en-US");
  return size >= 1000 ? Math.round(value).toLocaleString("en-US") : String(+value.toPrecision(4));
}
function seconds(value) {
  if (value === null || !isFinite(value)) return "-";
  if (value === 0) return "0 s";
  if (value < 0.1) return `${+(value * 1000).toPrecision(3)} ms`;
  if (value < 120) return `${+value.toPrecision(3)} s`;
  const minutes = Math.floor(value / 60);
  if (minutes < 120) return `${minutes} min ${Math.round(value % 60)} s`;
  const hours = Math.floor(minutes / 60);
  return hours < 48 ? `${hours} h ${minutes % 60} min` : `${Math.floor(hours / 24)} d ${hours % 24} h`;
}
const date = (unix) => unix ? new Date(unix * 1000).toLocaleString([], { dateStyle: "medium", timeStyle: "short" }) : "-";

// ---- the one tooltip
const tip = document.getElementById("tip");
function showTip(event, ...children) {
  tip.replaceChildren(...children);
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  const left = event.clientX + 14 + box.width > innerWidth ? event.clientX - box.width - 14 : event.clientX + 14;
  const top = event.clientY + 16 + box.height > innerHeight ? event.clientY - box.height - 12 : event.clientY + 16;
  tip.style.left = `${Math.max(6, left)}px`;
  tip.style.top = `${Math.max(6, top)}px`;
}
const hideTip = () => { tip.hidden = true; };
const tipRow = (color, name, value) => el("div", { class: "row" }, color ? dot(color) : null, name, el("b", {}, value));

// ---- small parts
function section(id, title, note, ...tools) {
  const node = el("section", { id }, el("div", { class: "head" }, el("h2", {}, title), el("span", { class: "sub" }, note || ""), ...tools));
  document.getElementById("main").append(node);
  document.getElementById("nav").append(el("a", { href: `#${id}` }, title));
  return node;
}
/** Buttons of which one is pressed; `choose(i)` is called for the first at once. */
function choice(labels, choose, start = 0) {
  const buttons = labels.map((label, i) => el("button", { type: "button", onclick: () => set(i) }, label));
  function set(i) {
    buttons.forEach((button, j) => button.setAttribute("aria-pressed", String(i === j)));
    choose(i);
  }
  buttons.forEach((button, j) => button.setAttribute("aria-pressed", String(start === j)));
  return el("span", { class: "group", role: "group" }, buttons);
}
const runChoice = (choose) => RUNS.length > 1 ? choice(RUNS.map((run) => run.name), choose) : null;

/** Redraw `draw(width)` when the node's width or the theme changes. */
function onWidth(node, draw) {
  let last = 0;
  const run = (force) => {
    const width = Math.floor(node.clientWidth);
    if (width > 0 && (force || width !== last)) { last = width; draw(width); }
  };
  new ResizeObserver(() => run(false)).observe(node);
  redraws.push(() => run(true));
}
function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  redraws.forEach((draw) => draw());
}
const wantsDark = matchMedia("(prefers-color-scheme: dark)");
document.documentElement.dataset.theme = wantsDark.matches ? "dark" : "light";
wantsDark.addEventListener("change", () => setTheme(wantsDark.matches ? "dark" : "light"));
