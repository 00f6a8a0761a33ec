// Makes elements. Text only ever becomes text nodes: nothing on this page parses HTML.

import { t } from "./i18n.js";

/** An element with properties and children (nodes, strings, or null for none). */
export function element(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "role") node.setAttribute(name, value);
    else node[name] = value;
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

/** A button with a text from the strings, which does something. */
export function button(key, onclick, className = "quiet small") {
  return element("button", { type: "button", className, textContent: t(key), onclick });
}

/** The element with an id, which the page is known to have. */
export function byId(id) {
  return document.getElementById(id);
}

/** Set a text, unless it is there already: an unchanged text is not announced again. */
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** Show an error and what helps. */
export function problem(error, ...actions) {
  return element("div", { className: "problem", role: "alert" },
    element("p", {}, element("strong", { textContent: error.message })),
    error.hint ? element("p", { textContent: error.hint }) : null,
    actions.length ? element("p", { className: "actions" }, ...actions) : null);
}
