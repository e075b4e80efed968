// Markdown to DOM nodes. What a model writes never passes through a parser of HTML: text becomes text nodes, and the
// only elements are those made here, so that nothing in an answer can run or load anything.

const SAFE_LINK = /^(https?:|mailto:)/i;

/** The elements for a text; an unfinished text gives what there is of it. */
export function render(source) {
  const fragment = document.createDocumentFragment();
  blocks(source.replace(/\r\n?/g, "\n").split("\n"), fragment, 0);
  return fragment;
}

function make(name, parent, text) {
  const element = document.createElement(name);
  if (text !== undefined) element.textContent = text;
  parent.append(element);
  return element;
}

// --- blocks -----------------------------------------------------------------------------------------------------------

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*\s*$/;
const RULE = /^ {0,3}([-*_])( *\1){2,}\s*$/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])(\s+|$)(.*)$/;
const QUOTE = /^ {0,3}> ?(.*)$/;
const TABLE_LINE = /^ {0,3}\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;
const MOST_LEVELS = 12;

function blocks(lines, parent, level) {
  let at = 0;
  while (at < lines.length) {
    const line = lines[at];
    if (!line.trim()) at += 1;
    else if (FENCE.test(line)) at = code(lines, at, parent);
    else if (HEADING.test(line)) at = heading(lines, at, parent);
    else if (RULE.test(line)) { make("hr", parent); at += 1; }
    else if (level < MOST_LEVELS && QUOTE.test(line)) at = quote(lines, at, parent, level);
    else if (level < MOST_LEVELS && ITEM.test(line)) at = list(lines, at, parent, level);
    else if (isTable(lines, at)) at = table(lines, at, parent);
    else at = paragraph(lines, at, parent, level);
  }
}

function code(lines, at, parent) {
  const [, fence, language] = FENCE.exec(lines[at]);
  const body = [];
  for (at += 1; at < lines.length; at += 1) {
    const end = FENCE.exec(lines[at]);
    if (end && end[1][0] === fence[0] && end[1].length >= fence.length && !end[2].trim()) { at += 1; break; }
    body.push(lines[at]);
  }
  const block = make("pre", parent);
  const element = make("code", block, body.join("\n"));
  const name = language.trim().split(/\s+/)[0];
  if (name) element.dataset.language = name;
  return at;
}

function heading(lines, at, parent) {
  const [, marks, text] = HEADING.exec(lines[at]);
  inline(text, make(`h${marks.length}`, parent));
  return at + 1;
}

function quote(lines, at, parent, level) {
  const inside = [];
  for (; at < lines.length && QUOTE.test(lines[at]); at += 1) inside.push(QUOTE.exec(lines[at])[1]);
  blocks(inside, make("blockquote", parent), level + 1);
  return at;
}

function list(lines, at, parent, level) {
  const first = ITEM.exec(lines[at]);
  const ordered = /\d/.test(first[2]);
  const element = make(ordered ? "ol" : "ul", parent);
  if (ordered && parseInt(first[2], 10) !== 1) element.start = parseInt(first[2], 10);
  while (at < lines.length) {
    const item = ITEM.exec(lines[at]);
    if (!item || /\d/.test(item[2]) !== ordered || RULE.test(lines[at])) break;
    const indent = item[1].length + item[2].length + Math.min(item[3].length || 1, 4);
    const inside = [item[4]];
    for (at += 1; at < lines.length; at += 1) {
      const line = lines[at];
      if (!line.trim()) {
        const next = lines.slice(at + 1).find((later) => later.trim());
        if (next === undefined || indentOf(next) < 2) break;
        inside.push("");
      } else if (indentOf(line) >= 2) inside.push(line.slice(Math.min(indentOf(line), indent)));
      else if (ITEM.test(line) || FENCE.test(line) || HEADING.test(line) || QUOTE.test(line)) break;
      else inside.push(line);
    }
    while (at < lines.length && !lines[at].trim()) at += 1;
    const entry = make("li", element);
    blocks(inside, entry, level + 1);
    const only = entry.children.length && entry.firstElementChild;
    if (only && only.tagName === "P") only.replaceWith(...only.childNodes); // tight: as lists mostly are
  }
  return at;
}

const indentOf = (line) => line.length - line.trimStart().length;

const isTable = (lines, at) => lines[at].includes("|") && at + 1 < lines.length && lines[at + 1].includes("-") &&
  TABLE_LINE.test(lines[at + 1]) && cells(lines[at]).length === cells(lines[at + 1]).length;

const cells = (line) => line.trim().replace(/^\|/, "").replace(/(?<!\\)\|$/, "").split(/(?<!\\)\|/)
  .map((cell) => cell.trim().replaceAll("\\|", "|"));

function table(lines, at, parent) {
  const element = make("table", parent);
  const head = make("tr", make("thead", element));
  const names = cells(lines[at]);
  for (const name of names) inline(name, make("th", head));
  const body = make("tbody", element);
  for (at += 2; at < lines.length && lines[at].includes("|") && lines[at].trim(); at += 1) {
    const row = make("tr", body);
    const found = cells(lines[at]);
    names.forEach((_, index) => inline(found[index] ?? "", make("td", row)));
  }
  return at;
}

function paragraph(lines, at, parent, level) {
  const text = [lines[at]];
  for (at += 1; at < lines.length; at += 1) {
    const line = lines[at];
    const ends = !line.trim() || FENCE.test(line) || HEADING.test(line) || RULE.test(line) ||
      (level < MOST_LEVELS && (QUOTE.test(line) || ITEM.test(line)));
    if (ends) break;
    text.push(line);
  }
  inline(text.join("\n"), make("p", parent));
  return at;
}

// --- inside a block ---------------------------------------------------------------------------------------------------

const TOKENS = new RegExp([
  "(?<escaped>\\\\[!-\\/:-@\\[-`{-~])",
  "(?<ticks>`+)(?<code>[^`]|[^`][\\s\\S]{0,4000}?[^`])\\k<ticks>(?!`)",
  "!?\\[(?<label>[^\\[\\]\\n]{1,300})\\]\\((?<target>[^\\s()]{1,2000})(?:\\s+\"[^\"\\n]{0,200}\")?\\)",
  "(?<url>https?:\\/\\/[^\\s<>()\\[\\]\"'`*]{1,2000}[^\\s<>()\\[\\]\"'`*.,;:!?])",
  "\\*\\*(?<strong>\\S(?:[^\\n]{0,2000}?\\S)?)\\*\\*",
  "(?<![*\\w])\\*(?<em>[^\\s*](?:[^*\\n]{0,2000}?[^\\s*])?)\\*(?!\\*)",
  "(?<![\\w_])_(?<em2>[^\\s_](?:[^_\\n]{0,2000}?[^\\s_])?)_(?!\\w)",
  "~~(?<struck>[^~\\n]{1,2000})~~",
  "(?<line>\\n)",
].join("|"), "g");

function inline(text, parent, level = 0) {
  let last = 0;
  for (const match of text.matchAll(TOKENS)) {
    const g = match.groups;
    parent.append(text.slice(last, match.index));
    last = match.index + match[0].length;
    if (g.escaped) parent.append(g.escaped[1]);
    else if (g.code !== undefined) make("code", parent, g.code.replaceAll("\n", " "));
    else if (g.label !== undefined) link(g.target, g.label, parent, level);
    else if (g.url) link(g.url, null, parent, level);
    else if (g.line) make("br", parent);
    else nested(match, parent, level);
  }
  parent.append(text.slice(last));
}

function nested(match, parent, level) {
  const g = match.groups;
  const [name, inside] = g.strong !== undefined ? ["strong", g.strong]
    : g.struck !== undefined ? ["del", g.struck] : ["em", g.em ?? g.em2];
  const element = make(name, parent);
  if (level < MOST_LEVELS) inline(inside, element, level + 1);
  else element.textContent = inside;
}

function link(target, label, parent, level) {
  if (!SAFE_LINK.test(target)) { parent.append(label ?? target); return; }
  const element = make("a", parent);
  element.href = target;
  element.target = "_blank";
  element.rel = "noopener noreferrer";
  if (label === null || level >= MOST_LEVELS) element.textContent = label ?? target;
  else inline(label, element, MOST_LEVELS);
}
