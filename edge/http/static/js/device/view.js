// The device: figures, charts, slots, models, MQTT and the log, asked for only while the view is to be seen.

import { getJson } from "../api.js";
import { byId, element, problem, setText } from "../dom.js";
import { bytes, duration, number, onLanguageChange, t, tKnown } from "../i18n.js";
import { Charts } from "./charts.js";
import { LogPanel } from "./logs.js";
import { ModelPanel } from "./models.js";
import { MqttPanel } from "./mqtt.js";

const EVERY_MS = 2000;

/** Connect the view; gives what the router wants of it. */
export function deviceView() {
  const view = new Device();
  return { show: () => view.show(), hide: () => view.hide() };
}

class Device {
  #charts = new Charts();
  #models = new ModelPanel();
  #panels = [this.#models, new MqttPanel(), new LogPanel()];
  #latest = null;
  #timer = 0;
  #visible = false;
  #asked = false; // whether the user was asked for a key since the view came up

  constructor() {
    document.addEventListener("visibilitychange", () => {
      if (this.#visible && document.visibilityState === "visible") this.#poll();
    });
    onLanguageChange(() => {
      this.#charts.rename();
      if (this.#latest) this.#render(this.#latest);
    });
  }

  show() {
    this.#visible = true;
    this.#asked = false;
    this.#charts.show();
    this.#models.show();
    this.#poll();
  }

  hide() {
    this.#visible = false;
    clearTimeout(this.#timer);
  }

  /** Ask for everything, and again after a while. */
  async #poll() {
    clearTimeout(this.#timer);
    if (!this.#visible || document.visibilityState !== "visible") return;
    const ask = !this.#asked;
    this.#asked = true;
    try {
      this.#latest = await getJson("v1/device", { ask });
      this.#render(this.#latest);
      this.#charts.add(this.#latest);
      byId("device-problem").replaceChildren();
      await Promise.all(this.#panels.map((panel) => panel.refresh(this.#latest)));
    } catch (error) {
      byId("device-problem").replaceChildren(problem(error));
    }
    clearTimeout(this.#timer);
    if (this.#visible) this.#timer = setTimeout(() => this.#poll(), EVERY_MS);
  }

  #render(device) {
    setText(byId("device-name"), device.name);
    renderFacts(byId("device-facts"), facts(device));
    renderSlots(device);
  }
}

function facts(device) {
  const { host, process, queue, model, throttle, firmware_throttling: { now: limits } } = device;
  return [
    ["model", [model.id, model.version, model.recipe].filter(Boolean).join(" · ")],
    ["version", `qwedge ${device.version}`],
    ["uptime", duration(device.uptime_s)],
    ["cores", host.cores],
    ["cpu", `${number(host.cpu_percent)} %`],
    ["ram", t("ofTotal", { used: bytes(host.ram_total_bytes - host.ram_available_bytes), total: bytes(host.ram_total_bytes) })],
    ["process", bytes(process.rss_bytes)],
    ["kvCache", bytes(device.kv_cache_bytes)],
    ["queue", t("ofTotal", { used: queue.waiting, total: queue.max_waiting })],
    ...(device.temperature_c === null ? [] : [["temperature", `${number(device.temperature_c)} °C`]]),
    ...(device.power_w === null ? [] : [["power", `${number(device.power_w, 1)} W`]]),
    ...(device.energy_j === null ? [] : [["energyTotal", `${number(device.energy_j / 3600, 2)} Wh`]]),
    ...(throttle.level ? [["throttle", t(`throttle_${throttle.reason}`, { percent: number(100 * throttle.speed) })]] : []),
    ...(limits.length ? [["firmware", limits.map((limit) => tKnown("limit_", limit)).join(", ")]] : []),
  ];
}

/** Names and values in a description list; nodes are kept where nothing changed. */
export function renderFacts(list, pairs) {
  if (list.childElementCount !== pairs.length) list.replaceChildren(...pairs.map(fact));
  pairs.forEach(([name, value], index) => {
    const [term, text] = list.children[index].children;
    setText(term, t(`fact_${name}`));
    setText(text, String(value));
  });
}

function fact() {
  return element("div", {}, element("dt"), element("dd"));
}

function renderSlots({ slots, queue }) {
  const rows = Array.from({ length: queue.slots }, (_, index) => slotRow(index, slots.find(({ slot }) => slot === index)));
  byId("slots").replaceChildren(...rows);
}

function slotRow(index, slot) {
  const cells = slot
    ? [t(`slot_${slot.status}`), number(slot.num_prompt_tokens), number(slot.num_cached_tokens),
      number(slot.num_output_tokens), number(slot.tokens_per_s, 1), duration(slot.age_s)]
    : [t("slot_free"), "", "", "", "", ""];
  return element("tr", { className: slot ? "busy" : "" }, element("th", { scope: "row", textContent: index + 1 }),
    ...cells.map((text) => element("td", { textContent: text })));
}
