// Puts the page together: the model's name, the key, the conversation, and what the engine says of itself.

import { key, request } from "./api.js";
import { BlockMap, KINDS } from "./block_map.js";
import { Chat } from "./chat.js";
import { Plot } from "./plots.js";
import { follow } from "./stats.js";

const $ = (id) => document.getElementById(id);
const WORDS = {
  live: "one sequence’s",
  tail: "last of a sequence",
  shared: "shared",
  cached: "cached",
  free: "free",
};

let model = "";

const percent = (share) => `${(100 * share).toFixed(share > 0 && share < 0.1 ? 1 : 0)}\u00a0%`;

function bytes(count) {
  const unit = Math.min(Math.floor(Math.log2(Math.max(count, 1)) / 10), 4);
  return `${(count / 1024 ** unit).toFixed(unit ? 1 : 0)} ${["bytes", "KiB", "MiB", "GiB", "TiB"][unit]}`;
}

// The key

// Shows the field and waits until a key is there that the server may take.
function askForKey() {
  $("key-form").hidden = false;
  $("key").focus();
  return new Promise((resolve) => {
    $("key-form").addEventListener("submit", (event) => {
      event.preventDefault();
      key.set($("key").value.trim());
      $("key").value = "";
      $("key-form").hidden = true;
      $("prompt").focus();
      resolve();
    }, { once: true });
  });
}

let asked = null; // one question at a time, however many requests were refused
async function onError(error) {
  if (error.status !== 401) return;
  asked ??= askForKey().finally(() => (asked = null));
  await asked;
  await findModel();
}

async function findModel() {
  try {
    const { data } = await (await request("v1/models")).json();
    model = data[0].id;
    $("model").textContent = model;
  } catch (error) {
    await onError(error);
  }
}

// What the engine says

function makeLegend() {
  const counts = new Map();
  for (const kind of KINDS) {
    const item = document.createElement("li");
    item.className = kind;
    const count = document.createElement("b");
    item.append(document.createElement("i"), WORDS[kind], count);
    $("legend").append(item);
    counts.set(kind, count);
  }
  return (blocks) => {
    for (const [kind, count] of counts) count.textContent = blocks.filter((block) => block.kind === kind).length;
  };
}

function makePlots() {
  const add = (title, lines, options) => new Plot($("plots"), { title, lines, ...options });
  const waste = add("Waste", [
    { name: "waste: reserved", colour: "--reserved", format: percent },
    { name: "internal", colour: "--internal", format: percent },
    { name: "external", colour: "--external", format: percent },
  ], { stacked: true, wide: true });
  const speed = add("tokens/s", [{ colour: "--accent", format: (now) => now.toFixed(0) }]);
  const hits = add("prefix hits", [{ colour: "--good", format: percent }], { top: 1 });
  const queue = add("Queue", [
    { name: "running", colour: "--reserved", format: String },
    { name: "waiting", colour: "--internal", format: String },
  ]);
  return ({ time, memory, ...now }) => {
    const held = Math.max(memory.used + memory.reserved + memory.internal + memory.external, 1);
    waste.add(time, [memory.reserved / held, memory.internal / held, memory.external / held]);
    speed.add(time, [now.tokensPerSecond]);
    hits.add(time, [now.hitTokens / Math.max(now.queriedTokens, 1)]);
    queue.add(time, [now.running, now.waiting]);
  };
}

function tell(state) {
  const words = { connecting: "connecting", live: "live", paused: "paused", lost: "connection lost, trying again" };
  if ($("connection").dataset.state === state) return;
  $("connection").dataset.state = state;
  $("connection").textContent = words[state];
}

const map = new BlockMap($("map"), $("block"));
const countKinds = makeLegend();
const plot = makePlots();

function show(snapshot) {
  map.show(snapshot);
  countKinds(snapshot.blocks);
  plot(snapshot);
  const { blocks, blockSize, memory } = snapshot;
  const size = `${blocks.length.toLocaleString("en")} blocks of ${blockSize} tokens, ${bytes(memory.cache)}`;
  const saved = memory.saved ? `; sharing saves ${bytes(memory.saved)}` : "";
  $("cache-size").textContent = size + saved;
}

new Chat(() => model, onError);
await findModel();
follow(show, tell, onError);
