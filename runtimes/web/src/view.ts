/** The parts of `<mmd-sampler>`: built once, filled by the element. */

import { STYLE } from "./style.js";

const MARKUP = `
<style>${STYLE}</style>
<header>
  <div><h1>Opening …</h1><p class="soft summary"></p></div>
  <p class="runtime" role="status"><span class="badge backend" hidden></span><span class="soft note"></span></p>
</header>
<p class="card alert" role="alert" hidden></p>
<section class="card drawing">
  <form>
    <label>Seed
      <span class="joined"><input class="seed" type="text" inputmode="numeric" pattern="[0-9]{1,20}" required
        autocomplete="off"><button class="action random" type="button" title="A seed by chance">Random</button></span>
    </label>
    <label class="class-field" hidden>Class <input class="class" type="number" min="0" step="1" value="0"></label>
    <label class="count"><span>Images: <output class="shown-count"></output></span>
      <input class="number" type="range" min="1" step="1"></label>
    <button class="action main draw" type="submit" disabled>Draw</button>
  </form>
  <div class="images"></div>
</section>
<section class="card chain" hidden>
  <div class="title"><h2></h2><p class="soft">the state after every step, inside the one graph</p></div>
  <ol class="steps"></ol>
</section>
<section class="card test">
  <div class="title">
    <h2>Self-test <span class="badge verdict" hidden></span></h2>
    <button class="action check" type="button" disabled>Run again</button>
  </div>
  <p class="soft about-test">The golden noise of the bundle, compared with the images of the float64 reference.</p>
  <dl class="facts"></dl>
</section>
<section class="card">
  <h2>Times</h2>
  <dl class="times"></dl>
</section>
`;

function part<T extends Element>(root: ShadowRoot, selector: string): T {
  const found = root.querySelector<T>(selector);
  if (!found) throw new Error(`the markup has no ${selector}`);
  return found;
}

export type View = ReturnType<typeof build>;

/** Fill a shadow root; returns what the element reads and writes. */
export function build(root: ShadowRoot) {
  root.innerHTML = MARKUP;
  const element = (selector: string) => part<HTMLElement>(root, selector);
  return {
    title: element("h1"), summary: element(".summary"), backend: element(".backend"), note: element(".note"),
    alert: element(".alert"), drawing: element(".drawing"), images: element(".images"),
    form: part<HTMLFormElement>(root, "form"),
    seed: part<HTMLInputElement>(root, ".seed"), random: part<HTMLButtonElement>(root, ".random"),
    classField: element(".class-field"), class: part<HTMLInputElement>(root, ".class"),
    number: part<HTMLInputElement>(root, ".number"), shownCount: element(".shown-count"),
    draw: part<HTMLButtonElement>(root, ".draw"),
    chain: element(".chain"), chainTitle: element(".chain h2"), steps: element(".steps"),
    verdict: element(".verdict"), check: part<HTMLButtonElement>(root, ".check"), facts: element(".facts"),
    times: element(".times"),
  };
}

/** Pairs of a name and a value, in place of those that stood there. */
export function fillList(list: HTMLElement, pairs: readonly (readonly [string, string])[]): void {
  list.replaceChildren(...pairs.map(([name, value]) => {
    const pair = document.createElement("div");
    pair.append(make("dt", name), make("dd", value));
    return pair;
  }));
}

/** A new element with a text. */
export function make<K extends keyof HTMLElementTagNameMap>(tag: K, text = "", className = ""): HTMLElementTagNameMap[K] {
  const made = document.createElement(tag);
  made.textContent = text;
  made.className = className;
  return made;
}

export function milliseconds(value: number): string {
  return `${value.toFixed(value < 10 ? 2 : 0)} ms`;
}
