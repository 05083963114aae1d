/**
 * `<mmd-sampler bundle="bundle/">`: seed, count, images, the state after every step, self-test and times.
 *
 * Attributes: `bundle` (URL of the folder), `seed`, `count`, `max-count`, `backend` (`auto`, `webgpu`, `wasm`), `self-test`
 * (run it once the first images are there). Events: `mmd-first-image`, `mmd-drawn`, `mmd-self-test`, `mmd-error`.
 */

import type { BrowserSampler } from "./client.js";
import { openBundle } from "./client.js";
import { nextBatch } from "./core/batches.js";
import type { Manifest, SelfTest, Tensor, Tensors } from "./core/index.js";
import { classLabels, oneLine, picture, report, UsageError } from "./core/index.js";
import type { Backend } from "./engine.js";
import { paint } from "./paint.js";
import type { View } from "./view.js";
import { build, fillList, make, milliseconds } from "./view.js";

const KNOWN_INPUTS = ["noise", "step_noise", "class_labels"];
const NAMES: Readonly<Record<Backend, string>> = { wasm: "WebAssembly", webgpu: "WebGPU" };

export class SamplerElement extends HTMLElement {
  private readonly view: View = build(this.attachShadow({ mode: "open" }));
  private readonly times: Record<string, string> = {};
  private drawing = 0; // the number of the drawing; an older one stops when it sees a newer
  private chosen = 0;
  private drawn = { seed: 0n, label: 0 }; // what the fields said when the images were drawn
  /** The open sampler; null before `connectedCallback` and after an error. */
  sampler: BrowserSampler | null = null;
  /** The last self-test; null if none has run. */
  lastSelfTest: SelfTest | null = null;

  connectedCallback(): void {
    const { view } = this;
    view.seed.value = this.getAttribute("seed") ?? "0";
    view.number.max = this.getAttribute("max-count") ?? "64";
    view.number.value = this.getAttribute("count") ?? "16";
    view.shownCount.textContent = view.number.value;
    view.number.oninput = () => { view.shownCount.textContent = view.number.value; };
    view.number.onchange = () => void this.draw();
    view.form.onsubmit = (event) => { event.preventDefault(); void this.draw(); };
    view.random.onclick = () => { view.seed.value = String(randomSeed()); void this.draw(); };
    view.check.onclick = () => void this.selfTest();
    void this.open();
  }

  disconnectedCallback(): void {
    this.drawing++;
    this.sampler?.close();
    this.sampler = null;
  }

  /** Draw the images that the fields ask for, batch by batch, then the steps of the chosen one. */
  async draw(): Promise<void> {
    const { sampler, view } = this;
    if (!sampler || !view.form.reportValidity()) return;
    const mine = ++this.drawing;
    const seed = BigInt(view.seed.value), count = Number(view.number.value);
    this.drawn = { seed, label: Number(view.class.value) };
    await this.guarded(async () => {
      view.images.replaceChildren(...Array.from({ length: count }, () => make("div", "", "waiting")));
      const start = performance.now();
      for (let first = 0; first < count; ) {
        const part = Math.min(nextBatch(sampler.about.manifest.batch, count - first), count - first);
        const images = await sampler.sample(seed, { first, count: part, conditions: this.conditions(part) });
        if (mine !== this.drawing) return;
        for (let i = 0; i < part; i++) this.show(images, i, first + i);
        first += part;
      }
      this.time("each image", (performance.now() - start) / count);
      this.dispatchEvent(new CustomEvent("mmd-drawn", { detail: { seed, count } }));
      await this.choose(Math.min(this.chosen, count - 1));
    });
  }

  /** Run the self-test and show what it found. */
  async selfTest(): Promise<void> {
    const { sampler, view } = this;
    if (!sampler) return;
    view.check.disabled = true;
    await this.guarded(async () => {
      const test = await sampler.selfTest();
      this.lastSelfTest = test;
      view.verdict.hidden = false;
      view.verdict.textContent = test.passed ? "passed" : "FAILED";
      view.verdict.className = `badge verdict ${test.passed ? "passed" : "failed"}`;
      view.verdict.title = report(test);
      const facts: [string, string][] = [
        ["golden images", String(test.images)],
        ["largest error", test.fault || test.worst.toPrecision(2)],
        ["tolerance", String(test.tolerance)],
      ];
      if (!test.fault && test.mean > test.meanLimit) {
        facts.push(["mean error", test.mean.toPrecision(2)], ["its limit", test.meanLimit.toPrecision(2)]);
      }
      fillList(view.facts, [...facts, ["a batch", milliseconds(test.milliseconds)]]);
      this.dispatchEvent(new CustomEvent("mmd-self-test", { detail: test }));
    });
    view.check.disabled = false;
  }

  private async open(): Promise<void> {
    await this.guarded(async () => {
      const bundle = this.getAttribute("bundle");
      if (!bundle) throw new UsageError("<mmd-sampler> has no bundle; give it one, such as bundle=\"./bundle/\"");
      const backend = (this.getAttribute("backend") ?? "auto") as Backend | "auto";
      const sampler = await openBundle(bundle, { backend });
      if (!this.isConnected) return sampler.close();
      this.sampler = sampler;
      this.introduce(sampler);
      await this.draw();
      if (this.hasAttribute("self-test")) await this.selfTest();
    });
  }

  private introduce({ about }: BrowserSampler): void {
    const { view } = this, { manifest } = about;
    view.title.textContent = manifest.name;
    view.summary.textContent = summary(manifest);
    view.backend.hidden = false;
    view.backend.textContent = NAMES[about.backend];
    view.note.textContent = about.note && `instead of WebGPU: ${about.note}`;
    view.classField.hidden = !manifest.inputs.some(({ name }) => name === "class_labels");
    view.draw.disabled = view.check.disabled = false;
    view.images.style.setProperty("--tile", `${tileWidth(manifest)}px`);
    this.time("bundle read and checked", about.times.bundle);
    this.time("graph loaded", about.times.graph);
    const foreign = manifest.inputs.map(({ name }) => name).filter((name) => !KNOWN_INPUTS.includes(name));
    if (foreign.length) {
      view.draw.disabled = true;
      throw new UsageError(`this graph also takes ${foreign.join(", ")}: call openBundle() and sample() from your page`);
    }
  }

  /** Put one image where its place waits. */
  private show(images: Tensor, row: number, index: number): void {
    const { view } = this;
    const tile = make("button", "", "tile");
    tile.type = "button";
    tile.title = `image ${index} of seed ${this.drawn.seed}: its steps`;
    tile.setAttribute("aria-label", tile.title);
    tile.append(paint(make("canvas"), picture(images, row)));
    tile.onclick = () => void this.guarded(() => this.choose(index));
    view.images.children[index].replaceWith(tile);
    if (!("first image after" in this.times)) {
      performance.mark("mmd-first-image");
      this.time("first image after", performance.now());
      this.dispatchEvent(new CustomEvent("mmd-first-image"));
    }
  }

  /** Show the steps of one image. */
  private async choose(index: number): Promise<void> {
    const { sampler, view } = this;
    if (!sampler) return;
    const mine = this.drawing;
    this.chosen = index;
    [...view.images.children].forEach((tile, i) => tile.setAttribute("aria-pressed", String(i === index)));
    const { steps, inputs } = sampler.about.manifest;
    const channels = inputs.find(({ name }) => name === "noise")?.shape[1];
    if (channels !== 1 && channels !== 3) return; // states that are latents; a picture has 1 or 3 channels
    const options = { first: index, conditions: this.conditions(1) };
    const { noise, states } = await sampler.chain(this.drawn.seed, options);
    if (mine !== this.drawing || index !== this.chosen) return;
    view.chain.hidden = false;
    view.chainTitle.textContent = `From noise to image ${index}`;
    const strip = [this.step(noise, 1, "noise", "")];
    states.forEach((state, k) => {
      const next = steps[k + 1]; // each state is shown on the scale of its level: alpha x0 + sigma noise
      const scale = next ? 1 / Math.hypot(next.alpha, next.sigma) : 1;
      strip.push(this.step(state, scale, `step ${k + 1}`, `t = ${Number(steps[k].timestep.toFixed(2))}`));
    });
    view.steps.replaceChildren(...strip);
  }

  private step(state: Tensor, scale: number, name: string, detail: string): HTMLLIElement {
    const item = make("li");
    item.append(paint(make("canvas"), picture(state, 0, scale)), make("span", name), make("small", detail));
    return item;
  }

  private conditions(count: number): Tensors {
    return this.view.classField.hidden ? {} : { class_labels: classLabels(this.drawn.label, count) };
  }

  private time(name: string, value: number): void {
    this.times[name] = milliseconds(value);
    fillList(this.view.times, Object.entries(this.times));
  }

  /** Run `work`; what it throws is said on the page. */
  private async guarded(work: () => Promise<void>): Promise<void> {
    const { view } = this;
    view.alert.hidden = true;
    try {
      await work();
    } catch (error) {
      if (!this.isConnected) return;
      view.alert.hidden = false;
      view.alert.textContent = oneLine(error);
      if (!this.sampler) view.title.textContent = "This bundle cannot be used";
      this.dispatchEvent(new CustomEvent("mmd-error", { detail: error }));
    }
  }
}

function summary(manifest: Manifest): string {
  const shape = manifest.outputs.find(({ name }) => name === "sample")?.shape.slice(1).join(" × ");
  const calls = manifest.steps.length === 1 ? "1 step" : `${manifest.steps.length} steps`;
  return `${calls} in one graph, ${manifest.precision}, ${shape}`;
}

/** As wide as an image, within what is legible and what fits. */
function tileWidth({ outputs }: Manifest): number {
  const { dtype, shape } = outputs.find(({ name }) => name === "sample") ?? { dtype: "float32", shape: [] };
  return Math.min(Math.max(72, Number(shape[dtype === "uint8" ? 2 : 3]) || 0), 200);
}

function randomSeed(): number {
  return crypto.getRandomValues(new Uint32Array(1))[0];
}
