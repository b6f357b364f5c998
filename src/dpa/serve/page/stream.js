// Talking to the gateway: JSON requests, and chat answers as they are written. Nothing here touches the page.

// A refusal: the server's own sentence, its HTTP status (0: no connection), and how long it asks to wait.
export class Refusal extends Error {
  constructor(message, status, retryAfter = null) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

// Why a key cannot be sent, or "". A header holds Latin-1 only; of anything else fetch makes the error that it makes where
// there is no server.
export const faultOf = (key) =>
  /[^\x00-\xff]/.test(key) ? "The key has a character that cannot be sent, such as a typographic quote." : "";

const headersOf = (key) => ({
  "Content-Type": "application/json",
  ...(key ? { Authorization: `Bearer ${key}` } : {}),
});

async function send(path, { method = "GET", body, key = "", signal } = {}) {
  if (faultOf(key)) throw new Refusal(faultOf(key), 401);
  let response;
  try {
    response = await fetch(path, { method, headers: headersOf(key), body: body && JSON.stringify(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal("The server cannot be reached. Is it still running?", 0);
  }
  if (response.ok) return response;
  let message = "";
  try {
    message = (await response.json()).error.message;
  } catch {
    message = `The server answered ${response.status} without saying why.`;
  }
  const wait = Number(response.headers.get("Retry-After"));
  throw new Refusal(String(message), response.status, response.headers.has("Retry-After") && wait >= 0 ? wait : null);
}

// Whether a client that brings nothing is turned away: the browser may bring what it was told at its own prompt.
export async function asksForKey() {
  const response = await fetch("v1/models", { credentials: "omit" }).catch(() => null);
  return response?.status === 401;
}

export async function getJson(path, key) {
  return (await send(path, { key })).json();
}

export async function postJson(path, body, key, signal) {
  return (await send(path, { method: "POST", body, key, signal })).json();
}

// Stream one answer. Calls onText(piece) and onDirection(dpa); returns { finish, dpa } when it has ended.
// Throws Refusal, also where the stream breaks off; an abort throws the browser's AbortError.
export async function streamAnswer(body, key, signal, { onText, onDirection }) {
  const response = await send("v1/chat/completions", { method: "POST", body, key, signal });
  let finish = null;
  let dpa = null;
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return { finish, dpa };
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Refusal(String(chunk.error.message), response.status);
    if (chunk.dpa) {
      dpa = { ...dpa, ...chunk.dpa };
      onDirection(dpa);
    }
    const choice = chunk.choices?.[0];
    if (choice?.delta?.content) onText(choice.delta.content);
    finish = choice?.finish_reason ?? finish;
  }
  throw new Refusal("The answer broke off before its end.", response.status);
}

// The data of server-sent events, one string each.
async function* events(stream) {
  const reader = stream.getReader();
  const decoder = new TextDecoder();
  let pending = "";
  try {
    for (;;) {
      let read;
      try {
        read = await reader.read();
      } catch (error) {
        if (error.name === "AbortError") throw error;
        throw new Refusal("The connection was lost before the answer's end.", 0);
      }
      if (read.done) return;
      pending += decoder.decode(read.value, { stream: true });
      const lines = pending.split(/\r\n|\n|\r(?!$)/);
      pending = lines.pop();
      for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trimStart();
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
