// The KV cache as a sheet folded into pages of 8 × 8 blocks, on a canvas.
//
// A block is told by more than its colour: free is an outline, cached a stroke, shared a ring, a last block is filled
// as far as it is written.

export const FREE = "free", CACHED = "cached", SHARED = "shared", LIVE = "live", TAIL = "tail";
export const KINDS = [LIVE, TAIL, SHARED, CACHED, FREE];

const FOLD = 8; // blocks along a page
const LARGEST = 20, SMALLEST = 4; // cell, in CSS pixels, with its gap
const NARROWEST = 4; // fold between pages
const LEAF = FOLD * FOLD; // blocks in a page
const STEPS = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -FOLD, ArrowDown: FOLD, PageUp: -LEAF, PageDown: LEAF };
const TEXT = {
  [FREE]: "free",
  [CACHED]: "cached: the beginning of an earlier text, kept for the next one that starts alike",
  [SHARED]: "shared by several sequences",
};

export class BlockMap {
  // details: the element that tells about the block pointed at.
  constructor(canvas, details) {
    this.canvas = canvas;
    this.details = details;
    this.hint = details.textContent;
    this.blocks = []; // {kind, owner: number or null, filled: slots or null}
    this.snapshot = null;
    this.pointed = null;
    this.readColours();
    this.listen();
  }

  listen() {
    const canvas = this.canvas;
    canvas.addEventListener("pointermove", (event) => this.point(this.blockAt(event.offsetX, event.offsetY)));
    canvas.addEventListener("pointerdown", (event) => this.point(this.blockAt(event.offsetX, event.offsetY)));
    canvas.addEventListener("pointerleave", () => document.activeElement === canvas || this.point(null));
    canvas.addEventListener("blur", () => this.point(null));
    canvas.addEventListener("focus", () => this.pointed === null && this.blocks.length && this.point(0));
    canvas.addEventListener("keydown", (event) => this.move(event));
    new ResizeObserver(() => this.draw()).observe(canvas.parentElement);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
      this.readColours();
      this.draw();
    });
  }

  readColours() {
    const style = getComputedStyle(document.documentElement);
    const read = (name) => style.getPropertyValue(name).trim();
    this.colours = { ink: read("--ink"), rule: read("--rule"), cached: read("--cached"), shared: read("--shared") };
    this.lightness = read("--owner-lightness");
    this.chroma = read("--owner-chroma");
  }

  colourOf(owner) {
    return `oklch(${this.lightness} ${this.chroma} ${(owner * 137.508 + 35) % 360})`; // the golden angle
  }

  show(snapshot) {
    this.snapshot = snapshot;
    this.blocks = snapshot.blocks;
    this.draw();
    if (this.pointed !== null) this.tell();
  }

  // Geometry

  // The fewest pages side by side, and with them the largest cells, that keep the sheet within the frame.
  layOut() {
    const frame = this.canvas.parentElement, style = getComputedStyle(frame);
    const width = frame.clientWidth - 2 * parseFloat(style.paddingLeft), height = parseFloat(style.maxHeight);
    const pages = Math.ceil(this.blocks.length / LEAF);
    for (let across = 1; ; across++) {
      const layout = sizeFor(across, width, pages);
      if (layout.cell <= SMALLEST || (layout.cell <= LARGEST && layout.height <= height)) return layout;
    }
  }

  corner(index) {
    const { cell, page, across } = this.layout;
    const leaf = Math.floor(index / LEAF), within = index % LEAF;
    const x = (leaf % across) * page + (within % FOLD) * cell;
    const y = Math.floor(leaf / across) * page + Math.floor(within / FOLD) * cell;
    return [x, y];
  }

  blockAt(x, y) {
    if (!this.layout) return null;
    const { cell, page, across } = this.layout;
    const column = Math.floor((x % page) / cell), row = Math.floor((y % page) / cell);
    const leaf = Math.floor(y / page) * across + Math.floor(x / page);
    const index = leaf * LEAF + row * FOLD + column;
    return column < FOLD && row < FOLD && index >= 0 && index < this.blocks.length ? index : null;
  }

  // Drawing

  draw() {
    if (!this.blocks.length) return;
    const layout = (this.layout = this.layOut());
    const { canvas } = this, scale = devicePixelRatio;
    const width = Math.round(layout.width * scale), height = Math.round(layout.height * scale);
    if (canvas.width !== width || canvas.height !== height) {
      canvas.width = width;
      canvas.height = height;
      canvas.style.width = `${layout.width}px`;
      canvas.style.height = `${layout.height}px`;
    }
    const pen = canvas.getContext("2d");
    pen.setTransform(scale, 0, 0, scale, 0, 0);
    pen.clearRect(0, 0, layout.width, layout.height);
    const focus = this.blocks[this.pointed]?.owner ?? null;
    const size = layout.cell - (layout.cell > 6 ? 2 : 1);
    for (const [index, block] of this.blocks.entries()) {
      const [x, y] = this.corner(index);
      pen.globalAlpha = focus === null || block.owner === focus ? 1 : 0.3;
      this.drawBlock(pen, block, x, y, size);
    }
    pen.globalAlpha = 1;
    if (this.pointed !== null) this.drawPointer(pen, size);
  }

  drawBlock(pen, block, x, y, size) {
    const { colours } = this;
    pen.lineWidth = 1;
    pen.fillStyle = pen.strokeStyle = colours.rule;
    if (block.kind === LIVE || (block.kind === TAIL && block.owner !== null)) {
      pen.fillStyle = pen.strokeStyle = this.colourOf(block.owner);
    }
    if (block.kind === LIVE) {
      pen.fillRect(x, y, size, size);
    } else if (block.kind === TAIL) {
      const filled = Math.max(1, size * (block.filled ?? this.snapshot.blockSize / 2) / this.snapshot.blockSize);
      pen.strokeRect(x + 0.5, y + 0.5, size - 1, size - 1);
      pen.fillRect(x, y + size - filled, size, filled);
    } else if (block.kind === SHARED) {
      const edge = Math.max(1, Math.round(size / 4));
      pen.lineWidth = edge;
      pen.strokeStyle = colours.shared;
      pen.strokeRect(x + edge / 2, y + edge / 2, size - edge, size - edge);
    } else if (block.kind === CACHED) {
      pen.fillStyle = colours.cached;
      const stroke = Math.max(1, Math.round(size / 3));
      pen.fillRect(x, y + Math.round((size - stroke) / 2), size, stroke);
    } else {
      pen.strokeRect(x + 0.5, y + 0.5, size - 1, size - 1);
    }
  }

  drawPointer(pen, size) {
    const [x, y] = this.corner(this.pointed);
    pen.lineWidth = 2;
    pen.strokeStyle = this.colours.ink;
    pen.strokeRect(x - 1, y - 1, size + 2, size + 2);
  }

  // Pointing

  point(index) {
    if (index === this.pointed) return;
    this.pointed = index;
    this.draw();
    this.tell();
  }

  tell() {
    const block = this.blocks[this.pointed];
    const text = block ? `Block ${this.pointed}: ${this.describe(block)}` : this.hint;
    if (this.details.textContent !== text) this.details.textContent = text;
  }

  describe(block) {
    const { blockSize, owners } = this.snapshot;
    if (TEXT[block.kind]) return TEXT[block.kind];
    const filled = block.kind === LIVE ? `all ${blockSize}` : `${block.filled ?? "some"} of ${blockSize}`;
    const whose = block.owner === null ? "" : `, of ${owners.get(block.owner) ?? `sequence ${block.owner}`}`;
    return `${filled} tokens written${whose}`;
  }

  move(event) {
    const last = this.blocks.length - 1;
    const places = { Home: 0, End: last };
    const next = places[event.key] ?? (this.pointed ?? 0) + STEPS[event.key];
    if (!Number.isInteger(next)) return;
    event.preventDefault();
    this.point(Math.min(Math.max(next, 0), last));
  }
}

function sizeFor(across, width, pages) {
  const cell = Math.max(SMALLEST, Math.floor((width - (across - 1) * NARROWEST) / (FOLD * across)));
  const space = across > 1 ? Math.floor((width - across * FOLD * cell) / (across - 1)) : NARROWEST;
  const fold = Math.min(Math.max(space, NARROWEST), Math.max(cell, NARROWEST));
  const page = FOLD * cell + fold;
  return { cell, page, across, width: across * page - fold, height: Math.ceil(pages / across) * page - fold };
}
