// Our own API, and nothing else.

function headers(key) {
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

/** The model that is served: its name, and whether it has a chat template. */
export async function model(key) {
  const response = await fetch("/v1/models", { headers: headers(key) });
  if (!response.ok) throw new Error(await reason(response));
  return (await response.json()).data[0];
}

async function reason(response) {
  try { return (await response.json()).error.message; } catch { return `${response.status} ${response.statusText}`; }
}

/** The events of an answer, as they come. */
export async function* stream(path, body, key, signal) {
  const request = { ...body, stream: true, stream_options: { include_usage: true, continuous_usage_stats: true } };
  const response = await fetch(path, { method: "POST", headers: headers(key), body: JSON.stringify(request), signal });
  if (!response.ok) throw new Error(await reason(response));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    held += value;
    const lines = held.split("\n");
    held = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ")) continue;
      const data = line.slice(6);
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}
