// The chat page: conversations, messages, and an answer that is being written.

import { model as servedModel, stream } from "./api.js";
import { render } from "./markdown.js";
import { load, newConversation, save } from "./store.js";

const $ = (id) => document.getElementById(id);
const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens", "seed"];

const state = load();
let current = state.conversations.find((one) => one.id === state.current) ?? null;
let served = null;
let writing = null; // of the answer under way: { controller, conversation }

// --- settings and theme -------------------------------------------------------------------------------------------------

function showTheme() {
  const dark = state.theme ? state.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  document.documentElement.dataset.theme = dark ? "dark" : "light";
}

$("theme").addEventListener("click", () => {
  state.theme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  showTheme();
  save(state);
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", showTheme);

function toggleSettings() {
  $("settings").hidden = !$("settings").hidden;
  $("show-settings").setAttribute("aria-expanded", String(!$("settings").hidden));
  if (!$("settings").hidden) $("system").focus();
}
$("show-settings").addEventListener("click", toggleSettings);

for (const name of ["system", "key", ...NUMBERS]) {
  $(name).value = state.settings[name] ?? "";
  $(name).addEventListener("change", () => {
    state.settings[name] = $(name).value;
    save(state);
    if (name === "key") findModel();
  });
}

/** What the settings add to a request: what is not set is left to the model. */
function sampling() {
  const found = {};
  for (const name of NUMBERS) {
    const value = $(name).value.trim();
    if (value !== "" && Number.isFinite(Number(value))) found[name] = Number(value);
  }
  return found;
}

// --- conversations --------------------------------------------------------------------------------------------------------

function showConversations() {
  $("conversations").replaceChildren(...state.conversations.map((one) => {
    const item = document.createElement("li");
    item.className = one === current ? "current" : "";
    const open = button(one.title || "New conversation", "open", () => choose(one));
    if (one === current) open.setAttribute("aria-current", "true");
    const away = button("×", "delete", () => remove(one));
    away.setAttribute("aria-label", `Delete ${one.title || "conversation"}`);
    item.append(open, away);
    return item;
  }));
  $("title").textContent = current?.title || "New conversation";
}

function button(text, kind, action) {
  const made = document.createElement("button");
  made.type = "button";
  made.className = kind;
  made.textContent = text;
  made.addEventListener("click", action);
  return made;
}

function choose(conversation) {
  current = conversation;
  state.current = conversation?.id;
  save(state);
  showSidebar(false);
  showAll();
  $("input").focus();
}

function remove(conversation) {
  if (writing?.conversation === conversation) writing.controller.abort();
  state.conversations = state.conversations.filter((one) => one !== conversation);
  choose(current === conversation ? null : current);
}

function showSidebar(shown) {
  $("sidebar").classList.toggle("shown", shown);
  $("shade").hidden = !shown;
  $("menu").setAttribute("aria-expanded", String(shown));
}
$("menu").addEventListener("click", () => showSidebar(!$("sidebar").classList.contains("shown")));
$("shade").addEventListener("click", () => showSidebar(false));
$("new").addEventListener("click", () => choose(null));

// --- messages -----------------------------------------------------------------------------------------------------------

function showAll() {
  showConversations();
  const messages = current?.messages ?? [];
  $("log").replaceChildren(...messages.map((message, index) => shown(message, index)));
  if (!messages.length) {
    const hint = document.createElement("p");
    hint.className = "empty";
    hint.textContent = served && !served.chat
      ? "This model was not made for chat: it goes on with the text that you begin." : "What shall we talk about?";
    $("log").append(hint);
  }
  showBusy();
  $("log").scrollTop = $("log").scrollHeight;
}

function shown(message, index) {
  const element = document.createElement("article");
  element.className = `message ${message.role}`;
  const who = document.createElement("div");
  who.className = "who";
  who.textContent = message.role === "user" ? "You" : "Model";
  const thought = document.createElement("details");
  thought.append(document.createElement("summary"), document.createElement("div"));
  const text = document.createElement("div");
  text.className = "text";
  const tools = document.createElement("div");
  tools.className = "tools";
  element.append(who, thought, text, tools);
  fill(element, message, index);
  return element;
}

/** Show a message as it is now. */
function fill(element, message, index) {
  const [, thought, text, tools] = element.children;
  const isWriting = writing?.message === message;
  thought.hidden = !message.reasoning;
  if (message.reasoning) {
    thought.firstChild.textContent = isWriting && !message.content ? "Thinking…" : "Thoughts";
    thought.lastChild.replaceChildren(render(message.reasoning));
  }
  if (message.role === "user") text.textContent = message.content;
  else text.replaceChildren(render(message.content));
  text.classList.toggle("working", isWriting);
  for (const block of text.querySelectorAll("pre")) {
    block.append(button("Copy", "copy", () => copy(block.firstChild.textContent)));
  }
  tools.replaceChildren();
  if (isWriting) return;
  if (message.error) {
    const error = document.createElement("span");
    error.className = "error";
    error.textContent = message.error;
    tools.append(error);
  }
  if (message.content) tools.append(button("Copy", "copy", () => copy(message.content)));
  if (message.role === "user") tools.append(button("Edit", "edit", () => edit(index)));
  else if (index === current.messages.length - 1) tools.append(button("Regenerate", "again", regenerate));
  if (message.figures) {
    const figures = document.createElement("span");
    figures.className = "hint figures";
    figures.textContent = message.figures;
    tools.append(figures);
  }
}

async function copy(text) {
  try { await navigator.clipboard.writeText(text); say("Copied."); } catch { say("The browser does not allow copying."); }
}

function edit(index) {
  if (writing) return;
  $("input").value = current.messages[index].content;
  current.messages.length = index;
  save(state);
  showAll();
  grow();
  $("input").focus();
}

// --- answers ------------------------------------------------------------------------------------------------------------

function regenerate() {
  if (writing || current?.messages.at(-1)?.role !== "assistant") return;
  current.messages.pop();
  answer(current);
}

function submit() {
  const text = $("input").value.trim();
  if (!text || writing) return;
  if (!current) {
    current = newConversation();
    state.conversations.unshift(current);
    state.current = current.id;
  }
  current.title ||= text.split("\n")[0].slice(0, 60);
  current.messages.push({ role: "user", content: text });
  $("input").value = "";
  grow();
  answer(current);
}

function request(conversation) {
  const common = { ...sampling(), model: served?.id };
  if (served && !served.chat) {
    const text = conversation.messages.map((message) => message.content).join("");
    return ["/v1/completions", { max_tokens: 256, ...common, prompt: text }];
  }
  const system = $("system").value.trim();
  const messages = conversation.messages.map(({ role, content }) => ({ role, content }));
  if (system) messages.unshift({ role: "system", content: system });
  return ["/v1/chat/completions", { ...common, messages }];
}

async function answer(conversation) {
  const [path, body] = request(conversation);
  const message = { role: "assistant", content: "" };
  conversation.messages.push(message);
  const controller = new AbortController();
  writing = { controller, conversation, message };
  showAll();
  const times = { started: performance.now(), first: 0, last: 0, before: 0, tokens: 0 };
  let pending = false;
  const show = () => {
    pending = false;
    if (current !== conversation) return;
    const element = $("log").lastElementChild;
    const log = $("log");
    const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 80;
    fill(element, message, conversation.messages.length - 1);
    if (atEnd) log.scrollTop = log.scrollHeight;
  };
  try {
    for await (const event of stream(path, body, $("key").value.trim(), controller.signal)) {
      times.tokens = event.usage?.completion_tokens ?? times.tokens;
      const choice = event.choices[0];
      const text = choice?.delta?.content ?? choice?.text ?? "";
      const thought = choice?.delta?.reasoning_content ?? "";
      if (!text && !thought) continue;
      times.last = performance.now();
      if (!times.first) [times.first, times.before] = [times.last, times.tokens];
      message.content += text;
      if (thought) message.reasoning = (message.reasoning ?? "") + thought;
      if (!pending) { pending = true; requestAnimationFrame(show); }
    }
  } catch (error) {
    if (error.name !== "AbortError") message.error = String(error.message || error);
    else message.stopped = true;
  }
  message.figures = figures(times, message.stopped);
  writing = null;
  save(state);
  showAll();
  $("input").focus();
}

/** Time to the first tokens, and speed after them. */
function figures({ started, first, last, before, tokens }, stopped) {
  const parts = [];
  if (first) parts.push(`first token after ${((first - started) / 1000).toFixed(2)} s`);
  if (tokens > before && last > first) parts.push(`${((1000 * (tokens - before)) / (last - first)).toFixed(1)} tokens/s`);
  if (tokens) parts.push(`${tokens} tokens`);
  if (stopped) parts.push("stopped");
  return parts.join(" · ");
}

function showBusy() {
  $("stop").hidden = !writing;
  $("send").hidden = Boolean(writing);
}

function say(text) {
  $("status").textContent = text;
}

// --- keys and the form ----------------------------------------------------------------------------------------------------

function grow() {
  const input = $("input");
  input.rows = Math.min(12, input.value.split("\n").length);
}

$("form").addEventListener("submit", (event) => { event.preventDefault(); submit(); });
$("stop").addEventListener("click", () => writing?.controller.abort());
$("input").addEventListener("input", grow);
$("input").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); submit(); }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") {
    if (writing) writing.controller.abort();
    else showSidebar(false);
  } else if (event.altKey && event.code === "KeyN") { event.preventDefault(); choose(null); }
  else if (event.altKey && event.code === "KeyS") { event.preventDefault(); toggleSettings(); }
  else if (event.altKey && event.code === "KeyR") { event.preventDefault(); regenerate(); }
});

async function findModel() {
  try {
    served = await servedModel($("key").value.trim());
    $("model").textContent = served.id;
    say("");
  } catch (error) {
    say(`The server cannot be reached: ${error.message}`);
  }
  if (!writing) showAll();
}

showTheme();
showAll();
findModel();
