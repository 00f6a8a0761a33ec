// The log: its newest lines, from a level on.

import { getJson } from "../api.js";
import { byId, element } from "../dom.js";
import { timeOfDay } from "../i18n.js";

const MAX_ROWS = 300;

/** The panel. */
export class LogPanel {
  #last = 0; // number of the newest line that is shown

  constructor() {
    byId("log-level").addEventListener("change", () => {
      this.#last = 0;
      byId("log-lines").replaceChildren();
      this.refresh();
    });
  }

  /** Ask for the lines that are new. */
  async refresh() {
    const box = byId("log");
    const { lines } = await getJson(`v1/logs?after=${this.#last}&level=${byId("log-level").value}`, { ask: false });
    if (!lines.length) return;
    const atEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 40;
    byId("log-lines").append(...lines.filter(({ number }) => number > this.#last).map(row));
    this.#last = lines.at(-1).number;
    while (byId("log-lines").childElementCount > MAX_ROWS) byId("log-lines").firstElementChild.remove();
    if (atEnd) box.scrollTop = box.scrollHeight;
  }
}

function row({ time, level, logger, message }) {
  return element("li", { className: level.toLowerCase() },
    element("span", { className: "when", textContent: timeOfDay(time) }), " ",
    element("span", { className: "level", textContent: level }), " ",
    element("span", { className: "logger", textContent: logger.replace(/^edge\./, "") }), " ", message);
}
