// The status line: model, health and queue, asked for while the page is visible.

import { byId, setText } from "./dom.js";
import { onLanguageChange, t } from "./i18n.js";

const EVERY_MS = 4000;
let latest; // the newest health document; null when there was no answer, undefined before the first

/** Keep the status line up to date; gives a function that refreshes it at once. */
export function setUpStatus() {
  render();
  const refresh = async () => {
    if (document.visibilityState !== "visible") return;
    latest = await fetchHealth();
    render();
  };
  onLanguageChange(render);
  document.addEventListener("visibilitychange", refresh);
  setInterval(refresh, EVERY_MS);
  refresh();
  return refresh;
}

async function fetchHealth() {
  try {
    const response = await fetch("health", { cache: "no-store", signal: AbortSignal.timeout(5000) });
    return await response.json();
  } catch {
    return null;
  }
}

function render() {
  if (latest === undefined) return show("connecting", t("connecting"));
  if (latest === null || latest.queue === undefined) return show("offline", t("offline"));
  const { running, waiting } = latest.queue;
  const parts = [latest.model];
  if (latest.status !== "ok") parts.push(t(`status_${latest.status}`));
  else if (running === 0) parts.push(t(latest.asleep ? "asleep" : "ready"));
  if (running > 0) parts.push(t("running", latest.queue));
  if (waiting > 0) parts.push(t("waiting", latest.queue));
  return show(latest.status === "ok" && running > 0 ? "busy" : latest.status, parts.join(" · "));
}

function show(state, text) {
  byId("status").dataset.state = state;
  setText(byId("status"), text);
}
