// Small live plots: the last minute of a few numbers, each with its present value in words beside it.

const WINDOW = 60; // seconds

export class Plot {
  // lines: [{name, colour: a CSS custom property, format: value → text}]; stacked: lines lie upon each other;
  // top: fixed end of the scale; wide: takes the whole row.
  constructor(parent, { title, lines, stacked = false, top = null, wide = false }) {
    Object.assign(this, { lines, stacked, top });
    this.samples = []; // [seconds, [value of each line]]
    const figure = document.createElement("figure");
    figure.classList.toggle("wide", wide);
    const caption = document.createElement("figcaption");
    this.values = lines.map(({ name, colour }) => addValue(caption, name ?? title, colour));
    this.canvas = document.createElement("canvas");
    this.canvas.ariaHidden = "true";
    figure.append(caption, this.canvas);
    figure.ariaLabel = title;
    parent.append(figure);
    new ResizeObserver(() => this.draw()).observe(this.canvas);
  }

  add(time, values) {
    if (this.samples.length && time < this.samples.at(-1)[0]) this.samples = []; // the server began anew
    this.samples.push([time, values]);
    while (this.samples[0][0] < time - WINDOW) this.samples.shift();
    for (const [index, { format }] of this.lines.entries()) {
      const text = format(values[index]);
      if (this.values[index].textContent !== text) this.values[index].textContent = text;
    }
    this.draw();
  }

  draw() {
    const { canvas } = this, scale = devicePixelRatio;
    const width = canvas.clientWidth, height = canvas.clientHeight;
    canvas.width = width * scale;
    canvas.height = height * scale;
    if (!this.samples.length) return;
    const pen = canvas.getContext("2d");
    pen.scale(scale, scale);
    const rows = this.samples.map(([, values]) => (this.stacked ? cumulate(values) : values));
    const top = this.top ?? Math.max(...rows.flat(), 1e-9) * 1.08;
    const now = this.samples.at(-1)[0];
    const xs = this.samples.map(([time]) => width - ((now - time) / WINDOW) * width);
    const style = getComputedStyle(canvas);
    for (const index of [...this.lines.keys()].reverse()) {
      const ys = rows.map((row) => height - 1 - (Math.min(row[index], top) / top) * (height - 2));
      drawLine(pen, xs, ys, height, style.getPropertyValue(this.lines[index].colour), this.stacked || index === 0);
    }
  }
}

function addValue(caption, name, colour) {
  const item = document.createElement("span");
  const mark = document.createElement("i");
  mark.style.background = `var(${colour})`;
  const value = document.createElement("b");
  item.append(mark, `${name} `, value);
  caption.append(item);
  return value;
}

function drawLine(pen, xs, ys, height, colour, filled) {
  const line = new Path2D();
  xs.forEach((x, index) => line.lineTo(x, ys[index]));
  pen.strokeStyle = pen.fillStyle = colour;
  pen.lineWidth = 1.25;
  pen.stroke(line);
  if (!filled) return;
  line.lineTo(xs.at(-1), height);
  line.lineTo(xs[0], height);
  pen.globalAlpha = 0.2;
  pen.fill(line);
  pen.globalAlpha = 1;
}

function cumulate(values) {
  let sum = 0;
  return values.map((value) => (sum += value));
}
