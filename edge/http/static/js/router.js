// Which view is to be seen: #/chat, #/device or #/evaluate.

import { byId } from "./dom.js";

const NAMES = ["chat", "device", "evaluate"];

/** Show the view that the address names, now and whenever it changes. views: {name: {show, hide}}. */
export function setUpRouter(views) {
  let current = null;
  const route = () => {
    const name = NAMES.find((each) => location.hash === `#/${each}`) ?? "chat";
    if (name === current) return;
    if (current !== null) views[current].hide();
    for (const each of NAMES) byId(`${each}-view`).hidden = each !== name;
    for (const link of document.querySelectorAll("header nav a")) {
      if (link.hash === `#/${name}`) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
    }
    current = name;
    views[name].show();
  };
  addEventListener("hashchange", route);
  route();
}
