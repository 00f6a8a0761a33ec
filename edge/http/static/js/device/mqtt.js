// MQTT: the link, the newest messages, and a question over the real broker.

import { getJson, postForEvents } from "../api.js";
import { byId, element, problem } from "../dom.js";
import { bytes, t, tKnown, timeOfDay } from "../i18n.js";
import { renderFacts } from "./view.js";

const MAX_ROWS = 40;

/** The panel; nothing but a hint where MQTT is off. */
export class MqttPanel {
  #trying = null; // AbortController of the question that is under way

  constructor() {
    byId("mqtt-try").addEventListener("submit", (event) => {
      event.preventDefault();
      if (this.#trying) this.#trying.abort();
      else this.#try(byId("mqtt-text").value.trim());
    });
  }

  /** Ask for the state again. */
  async refresh({ mqtt }) {
    byId("mqtt-off").hidden = mqtt !== null;
    byId("mqtt-on").hidden = mqtt === null;
    if (mqtt === null) return;
    const { messages, ...state } = await getJson("v1/mqtt", { ask: false });
    renderFacts(byId("mqtt-facts"), facts(state));
    byId("mqtt-messages").replaceChildren(...messages.slice(-MAX_ROWS).reverse().map(row));
  }

  async #try(text) {
    if (!text) return;
    this.#trying = new AbortController();
    byId("mqtt-send").textContent = t("stop");
    const answer = element("p", { className: "answer" });
    const note = element("p", { className: "faint" });
    byId("mqtt-answer").replaceChildren(answer, note);
    const body = { messages: [{ role: "user", content: text }], max_tokens: 200 };
    try {
      for await (const { data } of postForEvents("v1/mqtt/try", body, this.#trying.signal)) {
        if (data?.kind === "text") answer.append(data.text);
        if (data?.kind === "progress") note.textContent = tKnown("mqtt_", data.name);
        if (data?.kind === "end") note.textContent = t("mqttAnswered", { tokens: data.answer.usage.completion_tokens });
      }
    } catch (error) {
      note.replaceChildren(error.name === "AbortError" ? t("stopped") : problem(error));
    }
    this.#trying = null;
    byId("mqtt-send").textContent = t("send");
  }
}

function facts(state) {
  return [
    ["link", state.problem ? `${t(`mqtt_${state.state}`)}: ${state.problem}` : t(`mqtt_${state.state}`)],
    ["broker", state.broker],
    ["protocol", `MQTT ${state.protocol}`],
    ["device", state.device],
    ["root", state.root],
    ["pool", t(state.pool ? "yes" : "no")],
    ["requests", state.requests],
    ["outcomes", state.outcomes],
  ];
}

function row(message) {
  return element("tr", {},
    element("td", { textContent: timeOfDay(message.time) }),
    element("td", { textContent: message.direction === "in" ? "→" : "←", "aria-label": t(`mqtt_${message.direction}`) }),
    element("td", { textContent: message.count > 1 ? `${message.kind} ×${message.count}` : message.kind }),
    element("td", { className: "topic", textContent: message.topic }),
    element("td", { className: "right", textContent: bytes(message.bytes) }));
}
