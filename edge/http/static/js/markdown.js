// Markdown to DOM nodes, for text nobody vouches for: every character of it ends in a text node, links lead to http(s)
// only, and there are no images. Covers what models write: paragraphs, headings, lists, quotes, tables, code.

import { element } from "./dom.js";
import { t } from "./strings.js";

const MAX_DEPTH = 12; // nested lists and quotes
const MAX_INLINE = 20000; // characters of one paragraph that are searched for markup

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^\s`]*)[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*\s*$/;
const RULE = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])(\s+|$)/;
const DIVIDER = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;

/** A fragment with the rendered text. */
export function renderMarkdown(text) {
  const fragment = document.createDocumentFragment();
  fragment.append(...blocks(text.replace(/\r\n?/g, "\n").replace(/\t/g, "    ").split("\n"), 0));
  return fragment;
}

function blocks(lines, depth) {
  const nodes = [];
  let at = 0;
  while (at < lines.length) {
    if (!lines[at].trim()) {
      at += 1;
      continue;
    }
    const reader = depth < MAX_DEPTH ? READERS.find(([test]) => test(lines, at)) : undefined;
    const [node, next] = (reader ? reader[1] : paragraph)(lines, at, depth);
    nodes.push(node);
    at = next;
  }
  return nodes;
}

// Each reader: does a block start at this line; read it and say where the next one starts.
const READERS = [
  [(lines, at) => FENCE.test(lines[at]), fence],
  [(lines, at) => HEADING.test(lines[at]), heading],
  [(lines, at) => RULE.test(lines[at]), (lines, at) => [element("hr"), at + 1]],
  [(lines, at) => QUOTE.test(lines[at]), quote],
  [isTable, table],
  [(lines, at) => ITEM.test(lines[at]), list],
];

function fence(lines, at) {
  const [, mark, language] = FENCE.exec(lines[at]);
  const closing = new RegExp(`^ {0,3}${mark[0]}{${mark.length},}\\s*$`);
  let end = at + 1;
  while (end < lines.length && !closing.test(lines[end])) end += 1;
  return [codeBlock(lines.slice(at + 1, end).join("\n"), language), end + 1];
}

function codeBlock(code, language) {
  const copy = element("button", { type: "button", className: "quiet small", textContent: t("copy") });
  copy.dataset.copy = "";
  return element(
    "figure",
    { className: "code" },
    element("figcaption", {}, element("span", { textContent: language }), copy),
    element("pre", { tabIndex: 0 }, element("code", { textContent: code })),
  );
}

function heading(lines, at) {
  const [, marks, text] = HEADING.exec(lines[at]);
  return [element(`h${marks.length}`, {}, ...inline(text)), at + 1];
}

function quote(lines, at, depth) {
  let end = at;
  while (end < lines.length && QUOTE.test(lines[end])) end += 1;
  const inner = lines.slice(at, end).map((line) => line.replace(QUOTE, ""));
  return [element("blockquote", {}, ...blocks(inner, depth + 1)), end];
}

function isTable(lines, at) {
  return lines[at].includes("|") && at + 1 < lines.length && lines[at + 1].includes("-") && DIVIDER.test(lines[at + 1])
    && cells(lines[at]).length === cells(lines[at + 1]).length;
}

function table(lines, at) {
  let end = at + 2;
  while (end < lines.length && lines[end].includes("|")) end += 1;
  const row = (tag, line) => element("tr", {}, ...cells(line).map((cell) => element(tag, {}, ...inline(cell))));
  const head = element("thead", {}, row("th", lines[at]));
  const body = element("tbody", {}, ...lines.slice(at + 2, end).map((line) => row("td", line)));
  return [element("div", { className: "table", tabIndex: 0 }, element("table", {}, head, body)), end];
}

function cells(line) {
  return line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
}

function list(lines, at, depth) {
  const [, , marker] = ITEM.exec(lines[at]);
  const ordered = /\d/.test(marker);
  const node = element(ordered ? "ol" : "ul", ordered ? { start: parseInt(marker, 10) } : {});
  let next = at;
  while (next < lines.length && startsItem(lines[next], ordered)) {
    const [item, end] = listItem(lines, next, depth);
    node.append(item);
    next = end;
  }
  return [node, next];
}

function startsItem(line, ordered) {
  const match = ITEM.exec(line);
  return match !== null && !RULE.test(line) && /\d/.test(match[2]) === ordered;
}

/** An item: its first line, and the lines that are indented further than its marker. */
function listItem(lines, at, depth) {
  const match = ITEM.exec(lines[at]);
  const indent = match[1].length;
  const inner = [lines[at].slice(match[0].length)];
  let end = at + 1;
  while (end < lines.length && (belongs(lines[end], indent) || (!lines[end].trim() && belongsAfterBlank(lines, end, indent)))) {
    inner.push(lines[end]);
    end += 1;
  }
  const shift = Math.min(...inner.slice(1).filter((line) => line.trim()).map(indentation), match[0].length);
  const content = blocks([inner[0], ...inner.slice(1).map((line) => line.slice(shift))], depth + 1);
  // A single paragraph needs no space of its own around it.
  const tight = content.length > 0 && content[0].tagName === "P";
  const nodes = tight ? [...content[0].childNodes, ...content.slice(1)] : content;
  while (end < lines.length && !lines[end].trim() && ITEM.test(lines[end + 1] ?? "")) end += 1;
  return [element("li", {}, ...nodes), end];
}

function belongs(line, indent) {
  return line.trim() !== "" && indentation(line) > indent;
}

function belongsAfterBlank(lines, at, indent) {
  return at + 1 < lines.length && belongs(lines[at + 1], indent);
}

function indentation(line) {
  return line.length - line.trimStart().length;
}

function paragraph(lines, at, depth) {
  let end = at + 1;
  const startsBlock = (line) => depth < MAX_DEPTH && READERS.some(([test]) => test(lines, line));
  while (end < lines.length && lines[end].trim() && !startsBlock(end)) end += 1;
  const nodes = lines.slice(at, end).flatMap((line, index) => (index ? ["\n", line] : [line])).join("").trim();
  return [element("p", {}, ...inline(nodes)), end];
}

// Code, escapes, strong, emphasis, struck, links, bare addresses; the first that matches at a place wins.
const INLINE = new RegExp(
  [
    "(?<tick>`+)(?<code>[^`]|[^`][\\s\\S]*?[^`])\\k<tick>(?!`)",
    // Not before brackets: \( and \[ open formulas, which are shown as they are written.
    "\\\\(?<escaped>[!-'*-/:-@\\\\^-`{-~])",
    "\\*\\*(?=\\S)(?<strong>[\\s\\S]*?\\S)\\*\\*",
    "\\*(?=[^\\s*])(?<emphasis>[^*]*?[^\\s*])\\*(?!\\*)",
    "(?<![\\p{L}\\p{N}_])__(?=\\S)(?<strong2>[\\s\\S]*?\\S)__(?![\\p{L}\\p{N}_])",
    "(?<![\\p{L}\\p{N}_])_(?=[^\\s_])(?<emphasis2>[^_]*?[^\\s_])_(?![\\p{L}\\p{N}_])",
    "~~(?=\\S)(?<struck>[\\s\\S]*?\\S)~~",
    "\\[(?<label>[^\\[\\]]+)\\]\\((?<target>[^\\s()]+(?:\\([^\\s()]*\\)[^\\s()]*)*)(?:\\s+\"[^\"]*\")?\\)",
    "(?<bare>https?:\\/\\/[^\\s<>\"'`]*[^\\s<>\"'`.,;:!?)\\]}*_])",
    "(?<line>\\n)",
  ].join("|"),
  "gu",
);

function inline(text) {
  if (text.length > MAX_INLINE) return [text];
  const nodes = [];
  let last = 0;
  for (const match of text.matchAll(INLINE)) {
    if (match.index > last) nodes.push(text.slice(last, match.index));
    nodes.push(inlineNode(match.groups, match[0]));
    last = match.index + match[0].length;
  }
  if (last < text.length) nodes.push(text.slice(last));
  return nodes;
}

function inlineNode(found, source) {
  if (found.code !== undefined) return element("code", { textContent: found.code.replace(/^ (.*\S.*) $/s, "$1") });
  if (found.escaped !== undefined) return found.escaped;
  if (found.line !== undefined) return element("br");
  const strong = found.strong ?? found.strong2;
  if (strong !== undefined) return element("strong", {}, ...inline(strong));
  const emphasis = found.emphasis ?? found.emphasis2;
  if (emphasis !== undefined) return element("em", {}, ...inline(emphasis));
  if (found.struck !== undefined) return element("s", {}, ...inline(found.struck));
  return link(found.target ?? found.bare, found.label ?? found.bare) ?? source;
}

/** A link to the web, or null: javascript:, data: and the like stay text. */
function link(target, label) {
  if (!/^https?:\/\//i.test(target) || !URL.canParse(target)) return null;
  return element("a", { href: target, target: "_blank", rel: "noopener noreferrer", textContent: label });
}
