// Markdown to DOM nodes, for text nobody vouches for: markdown-it reads it, and its tokens become elements of a short
// list with text nodes inside. Its HTML output is never used; links lead to http(s) and mailto only; no images.

import { element } from "../dom.js";
import { t } from "../i18n.js";
import MarkdownIt from "../../vendor/markdown-it.js";
import { highlighted } from "./highlight.js";

const MAX_LENGTH = 200000; // characters; a longer text stays as it is
const TAGS = new Set(["p", "h1", "h2", "h3", "h4", "h5", "h6", "ul", "ol", "li", "blockquote", "table", "thead", "tbody",
  "tr", "th", "td", "em", "strong", "s"]);
const LINK = /^(https?:\/\/|mailto:)/i;

const parser = new MarkdownIt({ html: false, linkify: true, breaks: true });
parser.linkify.set({ fuzzyLink: false, fuzzyEmail: false, fuzzyIP: false });

// \( and \[ open formulas in what models write: they are shown as they are written.
parser.inline.ruler.before("escape", "formula", (state, silent) => {
  if (!/^\\[()[\]]$/.test(state.src.slice(state.pos, state.pos + 2))) return false;
  if (!silent) state.pending += state.src.slice(state.pos, state.pos + 2);
  state.pos += 2;
  return true;
});

/** A rendered text that grows: blocks that did not change keep their nodes. */
export class MarkdownView {
  #box;
  #blocks = []; // {source, node} for each block

  constructor(box) {
    this.#box = box;
  }

  /** Show a text. */
  show(text) {
    const found = blocksOf(text);
    let same = 0;
    while (same < found.length && found[same].source === this.#blocks[same]?.source) same += 1;
    for (const { node } of this.#blocks.splice(same)) node.remove();
    for (const { source, tokens } of found.slice(same)) {
      const node = build(tokens);
      this.#box.append(node);
      this.#blocks.push({ source, node });
    }
  }
}

/** The blocks of the outermost level: their tokens, and the text that they were made from. */
function blocksOf(text) {
  if (text.length > MAX_LENGTH) return [{ source: text, tokens: plain(text) }];
  const lines = text.split("\n");
  const blocks = [];
  let tokens = [];
  let depth = 0;
  for (const token of parser.parse(text, {})) {
    tokens.push(token);
    depth += token.nesting;
    if (depth > 0) continue;
    const [start, end] = tokens[0].map;
    blocks.push({ source: lines.slice(start, end).join("\n"), tokens });
    tokens = [];
  }
  return blocks;
}

function plain(text) {
  return [{ type: "text", nesting: 0, content: text }];
}

/** One block as one node. */
function build(tokens) {
  const root = element("div", { className: "block" });
  fill(root, tokens);
  return root;
}

function fill(root, tokens) {
  const open = [root];
  for (const token of tokens) {
    const parent = open.at(-1);
    if (token.hidden) continue; // the paragraphs of a tight list
    if (token.nesting === 1) {
      const node = opened(token);
      parent.append(token.type === "table_open" ? element("div", { className: "table", tabIndex: 0 }, node) : node);
      open.push(node);
    } else if (token.nesting === -1) {
      open.pop();
    } else if (token.type === "inline") {
      fill(parent, token.children);
    } else {
      parent.append(leaf(token));
    }
  }
}

function opened(token) {
  if (token.type === "link_open") return link(token.attrGet("href"));
  const node = element(TAGS.has(token.tag) ? token.tag : "span");
  if (token.tag === "ol" && token.attrGet("start") !== null) node.start = Number(token.attrGet("start"));
  const align = /text-align:(center|right)/.exec(token.attrGet("style") ?? "");
  if (align) node.className = align[1];
  return node;
}

function leaf(token) {
  switch (token.type) {
    case "softbreak":
    case "hardbreak":
      return element("br");
    case "hr":
      return element("hr");
    case "code_inline":
      return element("code", { textContent: token.content });
    case "fence":
    case "code_block":
      return codeBlock(token.content.replace(/\n$/, ""), token.info.trim().split(/\s+/)[0]);
    case "image":
      return image(token);
    default:
      return document.createTextNode(token.content);
  }
}

/** A link to the web; what leads elsewhere is only text. */
function link(target) {
  if (!LINK.test(target)) return element("span");
  return element("a", { href: target, target: "_blank", rel: "noopener noreferrer" });
}

/** Images would have to be fetched: what is to be seen is a link to them. */
function image(token) {
  const target = token.attrGet("src");
  const node = link(target);
  node.textContent = token.content || target;
  return node;
}

function codeBlock(code, language) {
  return element("figure", { className: "code" },
    element("figcaption", {}, element("span", { textContent: language }),
      element("button", { type: "button", className: "quiet small copy-code", textContent: t("copy") })),
    element("pre", { tabIndex: 0 }, element("code", {}, ...highlighted(code, language.toLowerCase()))));
}
