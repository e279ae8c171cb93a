// The server's HTTP API: requests with the key of this tab, errors as sentences, server-sent events as an iterator.

const KEY = "octavo.key";

export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => sessionStorage.setItem(KEY, value),
};

// body: sent as JSON by POST; without it, GET. Paths are relative, so that the page works below a root path.
export async function request(path, { body, signal } = {}) {
  const headers = {};
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  if (body) headers["Content-Type"] = "application/json";
  const message = body ? { method: "POST", body: JSON.stringify(body) } : { method: "GET" };
  const response = await fetch(path, { ...message, headers, signal, cache: "no-store" });
  if (!response.ok) throw new ApiError(response.status, await explain(response));
  return response;
}

async function explain(response) {
  const text = await response.text();
  try {
    return JSON.parse(text).error.message;
  } catch {
    return `The server answered ${response.status} ${response.statusText}`;
  }
}

// The data of each server-sent event. Leaving the loop early closes the connection.
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      rest += value;
      const parts = rest.split(/\r?\n\r?\n/);
      rest = parts.pop();
      for (const part of parts) {
        const lines = part.split(/\r?\n/).filter((line) => line.startsWith("data:"));
        if (lines.length) yield lines.map((line) => line.slice(5).trimStart()).join("\n");
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // after an abort there is nothing left to cancel
  }
}
