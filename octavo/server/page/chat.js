// The conversation. Whatever comes from the model or the user enters the page as text nodes, never as markup.

import { events, request } from "./api.js";

const $ = (id) => document.getElementById(id);

export class Chat {
  // model: () → name to ask for. onError: called with what went wrong.
  constructor(model, onError) {
    this.model = model;
    this.onError = onError;
    this.messages = []; // {role, content}, as the API takes them
    this.abort = null; // of the answer being written
    this.listen();
  }

  listen() {
    $("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    $("prompt").addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.send();
    });
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.stop();
    });
    $("stop").addEventListener("click", () => this.stop());
    $("regenerate").addEventListener("click", () => this.regenerate());
    $("clear").addEventListener("click", () => this.clear());
  }

  send() {
    const text = $("prompt").value.trim();
    if (this.abort || !text || !this.fieldsAreValid()) return;
    $("prompt").value = "";
    this.messages.push({ role: "user", content: text });
    addTurn("user", "You").append(text);
    this.answer();
  }

  stop() {
    this.abort?.abort();
  }

  regenerate() {
    if (this.abort || !this.messages.length || !this.fieldsAreValid()) return;
    if (this.messages.at(-1).role === "assistant") this.messages.pop();
    if ($("conversation").lastElementChild.classList.contains("assistant")) $("conversation").lastElementChild.remove();
    this.answer();
  }

  clear() {
    this.stop();
    this.messages = [];
    $("conversation").replaceChildren(paragraph("opening", "A fresh sheet."));
    this.showState();
    $("prompt").focus();
  }

  fieldsAreValid() {
    const wrong = [...$("composer").elements].find((field) => !field.checkValidity());
    if (!wrong) return true;
    wrong.closest("details").open = true;
    wrong.reportValidity();
    return false;
  }

  async answer() {
    const messages = this.messages;
    const writer = new Writer(addTurn("assistant", this.model() || "Model"));
    this.abort = new AbortController();
    this.showState();
    showProblem("");
    try {
      const stream = { stream: true, stream_options: { include_usage: true } };
      const body = { model: this.model(), messages: withSystem(messages), ...stream, ...sampling() };
      await this.read(await request("v1/chat/completions", { body, signal: this.abort.signal }), writer);
    } catch (error) {
      if (error.name === "AbortError") writer.finish = "stopped";
      else this.fail(error, writer);
    }
    this.abort = null;
    writer.end();
    if (writer.text && messages === this.messages) messages.push({ role: "assistant", content: writer.text });
    this.showState();
  }

  async read(response, writer) {
    for await (const data of events(response)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      writer.usage = chunk.usage ?? writer.usage;
      const choice = chunk.choices?.[0];
      if (choice?.delta?.content) writer.write(choice.delta.content);
      if (choice?.finish_reason) writer.finish = choice.finish_reason;
    }
    throw new Error("The connection ended before the answer did");
  }

  fail(error, writer) {
    writer.finish = "error";
    showProblem(error.message);
    this.onError(error);
  }

  showState() {
    const busy = this.abort !== null;
    const focused = document.activeElement;
    $("send").hidden = busy;
    $("stop").hidden = !busy;
    if (focused === $("send") && busy) $("stop").focus();
    if (focused === $("stop") && !busy) $("prompt").focus();
    $("regenerate").disabled = busy || !this.messages.length;
    $("clear").disabled = !this.messages.length;
    $("conversation").ariaBusy = String(busy);
  }
}

// Writes an answer as it comes, once a frame; speaks it to screen readers sentence by sentence.
class Writer {
  constructor(body) {
    this.body = body;
    this.node = body.appendChild(document.createTextNode(""));
    body.parentElement.classList.add("writing");
    this.text = "";
    this.spoken = 0; // characters
    $("spoken").replaceChildren();
    this.finish = "";
    this.usage = null;
    this.frame = 0;
    this.started = performance.now();
    this.first = 0;
  }

  write(text) {
    this.first ||= performance.now();
    this.text += text;
    this.frame ||= requestAnimationFrame(() => this.show());
  }

  show() {
    this.frame = 0;
    const log = $("conversation");
    const follow = log.scrollHeight - log.scrollTop - log.clientHeight < 80;
    this.node.appendData(this.text.slice(this.node.length));
    if (follow) log.scrollTop = log.scrollHeight;
    const sentences = this.text.slice(this.spoken).match(/^[\s\S]*[.!?\n](?=\s|$)/);
    if (sentences) this.speak(this.spoken + sentences[0].length);
  }

  speak(end) {
    const text = this.text.slice(this.spoken, end).trim();
    if (text) $("spoken").append(paragraph("", text));
    this.spoken = end;
  }

  end() {
    cancelAnimationFrame(this.frame);
    this.show();
    this.speak(this.text.length);
    this.body.parentElement.classList.remove("writing");
    if (!this.text) {
      this.body.classList.add("empty");
      this.node.data = this.finish === "error" ? "No answer" : "Nothing was written";
    }
    this.body.after(paragraph("note colophon", this.colophon()));
    $("conversation").scrollTop = $("conversation").scrollHeight;
  }

  colophon() {
    const parts = [{ length: "cut at the most tokens", stopped: "stopped", error: "failed" }[this.finish]];
    if (this.first) parts.push(`first token after ${seconds(this.first - this.started)}`);
    if (this.usage) {
      const tokens = this.usage.completion_tokens;
      const writing = performance.now() - this.first;
      parts.push(`${tokens} ${tokens === 1 ? "token" : "tokens"}`);
      if (tokens > 1) parts.push(`${((1000 * (tokens - 1)) / writing).toFixed(0)} tokens/s`);
      const cached = this.usage.prompt_tokens_details?.cached_tokens;
      if (cached) parts.push(`${cached} of ${this.usage.prompt_tokens} prompt tokens were cached`);
    }
    return parts.filter(Boolean).join(" · ");
  }
}

function seconds(ms) {
  return ms < 1000 ? `${ms.toFixed(0)} ms` : `${(ms / 1000).toFixed(1)} s`;
}

function paragraph(className, text) {
  const element = document.createElement("p");
  element.className = className;
  element.textContent = text;
  return element;
}

// Returns the element that takes the turn's text.
function addTurn(role, name) {
  const turn = document.createElement("article");
  turn.className = `turn ${role}`;
  const title = document.createElement("h3");
  title.textContent = name;
  const body = document.createElement("div");
  body.className = "body";
  turn.append(title, body);
  $("conversation").querySelector(".opening")?.remove();
  $("conversation").append(turn);
  $("conversation").scrollTop = $("conversation").scrollHeight;
  return body;
}

function showProblem(text) {
  $("problem").textContent = text;
  $("problem").hidden = !text;
}

function withSystem(messages) {
  const content = $("system").value.trim();
  return content ? [{ role: "system", content }, ...messages] : messages;
}

// Only the fields that the user filled in; the server has its own defaults.
function sampling() {
  const fields = [...document.querySelectorAll(".fields input")].filter((field) => field.value !== "");
  return Object.fromEntries(fields.map((field) => [field.name, field.valueAsNumber]));
}
