// -- the server -------------------------------------------------------------------------------------

let ownKey = recall("sessionStorage", "key"); // in memory too, as the browser may keep nothing

class Failure extends Error {
  constructor(name, detail = "") {
    super(detail || name);
    this.failure = name;
    this.detail = detail;
  }
}

async function request(path, options = {}) {
  if (/[^ -~]/.test(ownKey ?? "")) throw new Failure("needsKey"); // no header could hold it
  const headers = ownKey === null ? {} : { Authorization: `Bearer ${ownKey}` };
  let response;
  try {
    response = await fetch(path, { ...options, headers: { ...headers, ...options.headers } });
  } catch (error) {
    throw error.name === "AbortError" ? error : new Failure("gone");
  }
  if (response.ok) return response;
  const said = await response.json().then((body) => body.error, () => null);
  throw failure(response.status, said ?? { code: "none" });
}

const AWAY = ["none", "engine_stopped", "shutting_down", "worker_lost"]; // "none": by a proxy before the server

function failure(status, { code, message }) {
  if (status >= 502 && status <= 504 && AWAY.includes(code)) return new Failure("gone");
  if (status === 401) return new Failure("needsKey");
  if (status === 429) return new Failure("busy");
  if (code === "context_length_exceeded") return new Failure("context");
  return new Failure("failed", message);
}

/** Server-sent events -> objects. Bytes may be cut anywhere, inside a character too. */
async function* events(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let [rest, isWhole] = ["", false];
  try {
    for (;;) {
      const { value, done } = await reader.read().catch((error) => {
        throw error.name === "AbortError" ? error : new Failure("cut");
      });
      if (done && !isWhole) throw new Failure("cut");
      if (done) return;
      const lines = (rest + decoder.decode(value, { stream: true })).split(/\r\n|\n/);
      rest = lines.pop();
      for (const line of lines) {
        const data = line.startsWith("data:") ? line.slice(5).trim() : "";
        isWhole = isWhole || data === "[DONE]";
        if (data && !isWhole) yield JSON.parse(data);
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

// -- when it is away, or busy -----------------------------------------------------------------------

const FIRST_LOOK_MS = 1000;
const LAST_LOOK_MS = 15000;
let trouble = null; // {name: "gone" or "busy"} until the server answers again

/** Say how the server is, by how the last question failed, if it did; look until that is over. */
function notice(failure) {
  const name = { gone: "gone", cut: "gone", busy: "busy" }[failure] ?? null;
  if (name && trouble?.name === name) return;
  trouble = name && { name };
  bar("server", name && (name === "gone" ? "away" : "full"));
  if (trouble) look(trouble, FIRST_LOOK_MS);
}

const HEALTH_MS = 10000; // of the slowest network that a page is used over

/** "ok" or "busy"; null where the server does not answer. */
async function health() {
  try {
    const response = await fetch("health", { signal: AbortSignal.timeout(HEALTH_MS) });
    return (await response.json()).status ?? null;
  } catch { return null; }
}

/** Whether the server is away; if so, the page says it. What an answer would replace stays then. */
async function isAway() {
  if ((await health()) !== null) return false;
  notice("gone");
  tell(say("away"));
  return true;
}

async function look(seen, pause) {
  await new Promise((next) => setTimeout(next, pause));
  const found = trouble === seen ? await health() : null;
  if (trouble !== seen) return;
  if (!found || (found === "busy" && seen.name === "busy")) {
    look(seen, Math.min(2 * pause, LAST_LOOK_MS));
    return;
  }
  trouble = null;
  bar("server", seen.name === "gone" ? "back" : "free");
  if (seen.name === "gone") greet();
}
