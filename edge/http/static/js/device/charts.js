// Live charts, drawn by uPlot: one figure each, the last minutes, in the colours of the theme.

import { byId, element, setText } from "../dom.js";
import { number, t } from "../i18n.js";
import { colour, onThemeChange } from "../theme.js";

const { uPlot } = globalThis;
const MAX_SAMPLES = 150; // five minutes
const HEIGHT = 130;
const KINDS = [
  { name: "tokens", unit: "", digits: 1, read: (device, before) => rate(device, before) },
  { name: "ttft", unit: " ms", digits: 0, read: (device) => device.ttft_ms },
  { name: "load", unit: "", digits: 0, read: ({ queue }) => queue.running + queue.waiting },
  { name: "ram", unit: " MB", digits: 0, read: ({ process }) => process.rss_bytes / 1e6 },
  { name: "cache", unit: " %", digits: 0, max: 100, read: (device) => percent(device.cache_hit_ratio) },
  { name: "temperature", unit: " °C", digits: 0, read: (device) => device.temperature_c },
  { name: "power", unit: " W", digits: 1, read: (device) => device.power_w },
];

/** All charts; one whose figure this machine cannot tell is not shown. */
export class Charts {
  #charts = KINDS.map((kind) => new Chart(kind));
  #before = null; // the sample before: {at, output_tokens}

  constructor() {
    byId("charts").append(...this.#charts.map(({ node }) => node));
    onThemeChange(() => this.#charts.forEach((chart) => chart.redraw()));
  }

  /** The view came up: what was between is a gap. */
  show() {
    this.#before = null;
    const now = Date.now() / 1000;
    for (const chart of this.#charts) chart.add(now, null);
  }

  /** The language has changed. */
  rename() {
    for (const chart of this.#charts) chart.rename();
  }

  /** Add a document of the device. */
  add(device) {
    const now = Date.now() / 1000;
    for (const chart of this.#charts) chart.add(now, chart.kind.read(device, this.#before));
    this.#before = { at: now, output_tokens: device.output_tokens };
  }
}

class Chart {
  #times = [];
  #values = [];
  #plot = null;
  #value = element("span", { className: "value" });
  #name = element("span");
  #box = element("div", { className: "plot" });
  kind;
  node = element("figure", { className: "chart", hidden: true },
    element("figcaption", {}, this.#name, this.#value), this.#box);

  constructor(kind) {
    this.kind = kind;
    this.node.dataset.chart = kind.name;
    this.rename();
    new ResizeObserver(() => this.#fit()).observe(this.#box);
  }

  rename() {
    setText(this.#name, t(`chart_${this.kind.name}`));
    this.#box.setAttribute("role", "img");
    this.#tell();
  }

  add(time, value) {
    this.#times.push(time);
    this.#values.push(value);
    if (this.#times.length > MAX_SAMPLES) {
      this.#times.shift();
      this.#values.shift();
    }
    if (this.node.hidden && value !== null) this.node.hidden = false;
    if (this.node.hidden) return;
    this.#tell();
    if (this.#plot) this.#plot.setData([this.#times, this.#values]);
    else this.redraw();
  }

  /** Draw anew, in the present colours. */
  redraw() {
    this.#plot?.destroy();
    this.#plot = null;
    if (this.node.hidden || !this.#box.clientWidth) return;
    this.#plot = new uPlot(this.#options(), [this.#times, this.#values], this.#box);
  }

  #fit() {
    if (!this.#plot) this.redraw();
    else if (this.#box.clientWidth) this.#plot.setSize({ width: this.#box.clientWidth, height: HEIGHT });
  }

  #tell() {
    const value = this.#values.at(-1) ?? null;
    const text = value === null ? "–" : number(value, this.kind.digits) + this.kind.unit;
    setText(this.#value, text);
    this.#box.setAttribute("aria-label", `${t(`chart_${this.kind.name}`)}: ${text}`);
  }

  #options() {
    const axis = { stroke: colour("--faint"), grid: { stroke: colour("--line"), width: 1 }, ticks: { show: false }, font: "11px system-ui" };
    return {
      width: this.#box.clientWidth,
      height: HEIGHT,
      legend: { show: false },
      cursor: { y: false, drag: { setScale: false } },
      scales: { y: { range: (_plot, _low, high) => [0, this.kind.max ?? Math.max(high * 1.15, 1)] } },
      axes: [{ ...axis, space: 70, values: (_plot, times) => times.map(clock), size: 24 }, { ...axis, size: 44, space: 34 }],
      series: [{}, { stroke: colour("--accent"), width: 2, fill: `${colour("--accent")}22`, points: { show: false } }],
    };
  }
}

function rate(device, before) {
  if (before === null || device.output_tokens < before.output_tokens) return null;
  return (device.output_tokens - before.output_tokens) / (Date.now() / 1000 - before.at);
}

function percent(ratio) {
  return ratio === null ? null : ratio * 100;
}

function clock(seconds) {
  return new Date(seconds * 1000).toTimeString().slice(0, 8);
}
