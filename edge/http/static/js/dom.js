// Makes elements. Text only ever becomes text nodes: nothing here parses HTML.

/** An element with properties and children (nodes or strings). */
export function element(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

/** The element with an id, which the page is known to have. */
export function byId(id) {
  return document.getElementById(id);
}
