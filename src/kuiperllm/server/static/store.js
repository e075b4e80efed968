// Conversations and settings, kept in this browser.

const PLACE = "kuiperllm";

/** Everything that is kept; what cannot be read is begun anew. */
export function load() {
  let found = {};
  try { found = JSON.parse(localStorage.getItem(PLACE)) ?? {}; } catch { /* damaged, or storage is off */ }
  const conversations = Array.isArray(found.conversations) ? found.conversations.filter(isConversation) : [];
  return { conversations, settings: found.settings ?? {}, theme: found.theme, current: found.current };
}

const isConversation = (one) => one && typeof one.id === "string" && Array.isArray(one.messages) &&
  one.messages.every((m) => m && (m.role === "user" || m.role === "assistant") && typeof m.content === "string");

/** Keep it; when the browser's room is used up, the oldest conversations go. */
export function save(state) {
  const kept = { ...state, conversations: state.conversations.slice(0, 200) };
  for (;;) {
    try { localStorage.setItem(PLACE, JSON.stringify(kept)); return; } catch {
      if (kept.conversations.length < 2) return;
      kept.conversations = kept.conversations.slice(0, Math.ceil(kept.conversations.length / 2));
    }
  }
}

export function newConversation() {
  return { id: Array.from(crypto.getRandomValues(new Uint32Array(3)), (n) => n.toString(36)).join(""), title: "", messages: [] };
}
