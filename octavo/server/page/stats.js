// The engine's state, several times a second: follows /v1/stats and turns each snapshot of the wire into the page's.

import { events, request } from "./api.js";
import { CACHED, FREE, LIVE, SHARED, TAIL } from "./block_map.js";

const FIRST_OWNER = 4; // cells below it: see KIND_OF
const KIND_OF = [FREE, CACHED, SHARED, TAIL];
const FIRST_WAIT = 0.5, LONGEST_WAIT = 10; // seconds until the next attempt

// Calls show(snapshot) for each snapshot and tell(state) with "live", "paused" or "lost", until the page closes.
// onError: called with the error that ended a connection. Rests while the page is hidden.
export async function follow(show, tell, onError) {
  for (let wait = FIRST_WAIT; ; wait = Math.min(2 * wait, LONGEST_WAIT)) {
    await visible(tell);
    const abort = new AbortController();
    const rest = () => document.hidden && abort.abort();
    document.addEventListener("visibilitychange", rest);
    try {
      const response = await request("v1/stats", { signal: abort.signal });
      for await (const data of events(response)) {
        tell("live");
        show(decode(JSON.parse(data)));
        wait = FIRST_WAIT;
      }
    } catch (error) {
      if (error.name !== "AbortError") await onError(error);
    } finally {
      document.removeEventListener("visibilitychange", rest);
    }
    if (abort.signal.aborted) continue;
    tell("lost");
    await new Promise((resolve) => setTimeout(resolve, 1000 * wait));
  }
}

function visible(tell) {
  if (!document.hidden) return;
  tell("paused");
  return new Promise((resolve) => document.addEventListener("visibilitychange", resolve, { once: true }));
}

// The wire: time (seconds of a steady clock), block_size, map, tails ([block, owner, slots written]), owners (number →
// request id), memory (MemoryReport.to_dict), running and waiting (requests), tokens_per_second, prefix_hit_tokens,
// prefix_queried_tokens. map: one cell a block, as block_map of engine/memory_report.py makes it, in base64.
function decode(wire) {
  const cells = Uint8Array.from(atob(wire.map), (letter) => letter.charCodeAt(0));
  const blocks = Array.from(cells, (cell) => {
    const owner = cell < FIRST_OWNER ? null : cell - FIRST_OWNER;
    return { kind: KIND_OF[cell] ?? LIVE, owner, filled: null };
  });
  for (const [block, owner, filled] of wire.tails) blocks[block] = { kind: TAIL, owner, filled };
  return {
    time: wire.time,
    blocks,
    blockSize: wire.block_size,
    owners: new Map(Object.entries(wire.owners).map(([number, name]) => [Number(number), name])),
    memory: wire.memory,
    running: wire.running,
    waiting: wire.waiting,
    tokensPerSecond: wire.tokens_per_second,
    hitTokens: wire.prefix_hit_tokens,
    queriedTokens: wire.prefix_queried_tokens,
  };
}
