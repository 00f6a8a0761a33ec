// The list of conversations.

import { askText, confirmed } from "../dialogs.js";
import { byId, element } from "../dom.js";
import { language, t } from "../i18n.js";

let shown = ""; // what the list was made from: a list that did not change keeps its nodes, and so the focus

/** Show the list. actions: {select(id), rename(id, title), remove(id)}. */
export function renderSidebar(conversations, currentId, actions) {
  const wanted = JSON.stringify([language(), currentId, conversations.map(({ id, title }) => [id, title])]);
  if (wanted === shown) return;
  shown = wanted;
  byId("conversations").replaceChildren(...conversations.map((each) => item(each, each.id === currentId, actions)));
}

/** Open or close the list where there is no room for it beside the conversation. */
export function setUpSidebar() {
  const opener = byId("open-sidebar");
  const toggle = (open) => {
    byId("sidebar").classList.toggle("open", open);
    opener.setAttribute("aria-expanded", String(open));
  };
  opener.addEventListener("click", () => {
    toggle(!byId("sidebar").classList.contains("open"));
    if (byId("sidebar").classList.contains("open")) byId("new-chat").focus();
  });
  byId("scroller").addEventListener("pointerdown", () => toggle(false));
  byId("sidebar").addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || !byId("sidebar").classList.contains("open")) return;
    event.stopPropagation();
    toggle(false);
    opener.focus();
  });
  return () => toggle(false);
}

function item(conversation, isCurrent, actions) {
  const title = conversation.title || t("untitled");
  const select = element("button", { type: "button", className: "quiet title", textContent: title });
  if (isCurrent) select.setAttribute("aria-current", "true");
  select.addEventListener("click", () => actions.select(conversation.id));
  return element("li", {}, select,
    iconButton("✎", "rename", title, async () => {
      const chosen = await askText(t("renameQuestion"), t("rename"), conversation.title);
      if (chosen !== null) actions.rename(conversation.id, chosen.trim());
    }),
    iconButton("✕", "remove", title, async () => {
      if (await confirmed(t("removeQuestion", { title }), t("remove"))) actions.remove(conversation.id);
    }));
}

function iconButton(sign, key, title, onclick) {
  const label = `${t(key)}: ${title}`;
  return element("button",
    { type: "button", className: `quiet icon ${key}`, textContent: sign, title: t(key), "aria-label": label, onclick });
}
