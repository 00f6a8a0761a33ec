// The status line: model, health and queue, asked for while the page is visible.

import { fetchHealth } from "./api.js";
import { byId } from "./dom.js";
import { t } from "./strings.js";

const EVERY_MS = 4000;

/** Keep the status line up to date. */
export function setUpStatus() {
  show("connecting", t("connecting"));
  const refresh = async () => {
    if (document.visibilityState === "visible") render(await fetchHealth());
  };
  document.addEventListener("visibilitychange", refresh);
  setInterval(refresh, EVERY_MS);
  refresh();
  return refresh;
}

function render(health) {
  if (health === null || health.queue === undefined) {
    show("offline", t("offline"));
    return;
  }
  const { running, waiting } = health.queue;
  const parts = [health.model];
  if (health.status !== "ok") parts.push(t(health.status));
  else if (running === 0) parts.push(t("ready"));
  if (running > 0) parts.push(t("running", health.queue));
  if (waiting > 0) parts.push(t("waiting", health.queue));
  show(health.status === "ok" && running > 0 ? "busy" : health.status, parts.join(" · "));
}

function show(state, text) {
  const line = byId("status");
  line.dataset.state = state;
  if (line.textContent !== text) line.textContent = text; // an unchanged text is not announced again
}
