// Colours code: highlight.js finds out what is what, and what it finds becomes spans with text nodes.

import bash from "../../vendor/highlight/bash.js";
import c from "../../vendor/highlight/c.js";
import hljs from "../../vendor/highlight/core.js";
import cpp from "../../vendor/highlight/cpp.js";
import diff from "../../vendor/highlight/diff.js";
import ini from "../../vendor/highlight/ini.js";
import javascript from "../../vendor/highlight/javascript.js";
import json from "../../vendor/highlight/json.js";
import python from "../../vendor/highlight/python.js";
import sql from "../../vendor/highlight/sql.js";
import xml from "../../vendor/highlight/xml.js";
import yaml from "../../vendor/highlight/yaml.js";

const LANGUAGES = { bash, c, cpp, diff, ini, javascript, json, python, sql, xml, yaml };
const MORE_NAMES = { javascript: ["typescript", "ts"], bash: ["shell", "console"] };
const MAX_LENGTH = 20000; // characters; longer code stays plain

for (const [name, grammar] of Object.entries(LANGUAGES)) hljs.registerLanguage(name, grammar);
for (const [languageName, aliases] of Object.entries(MORE_NAMES)) hljs.registerAliases(aliases, { languageName });

/** The code as nodes: coloured where its language is known. */
export function highlighted(code, language) {
  if (!language || code.length > MAX_LENGTH || !hljs.getLanguage(language)) return [code];
  const { _emitter: tree } = hljs.highlight(code, { language, ignoreIllegals: true });
  return tree.rootNode.children.map(toNode);
}

function toNode(found) {
  if (typeof found === "string") return document.createTextNode(found);
  const span = document.createElement("span");
  if (found.scope) span.className = `hl-${found.scope.split(".")[0]}`;
  span.append(...found.children.map(toNode));
  return span;
}
