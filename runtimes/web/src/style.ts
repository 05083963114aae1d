/** The look of `<mmd-sampler>`. A page may set the `--mmd-*` properties on the element. */

export const STYLE = `
:host {
  display: block;
  --ink: var(--mmd-ink, #171a24);
  --soft: var(--mmd-soft, #5a6072);
  --card: var(--mmd-card, #fff);
  --line: var(--mmd-line, #dfe2ea);
  --field: var(--mmd-field, #f4f5f8);
  --accent: var(--mmd-accent, #4353d6);
  --on-accent: var(--mmd-on-accent, #fff);
  --good: #14743f;
  --good-back: #dff5e7;
  --bad: #a3222c;
  --bad-back: #fde6e7;
  color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif;
}
@media (prefers-color-scheme: dark) {
  :host {
    --ink: var(--mmd-ink, #e9ebf2);
    --soft: var(--mmd-soft, #9aa1b5);
    --card: var(--mmd-card, #171a23);
    --line: var(--mmd-line, #2b3040);
    --field: var(--mmd-field, #10131b);
    --accent: var(--mmd-accent, #8f9bff);
    --on-accent: var(--mmd-on-accent, #0e1016);
    --good: #7fdca4;
    --good-back: #12331f;
    --bad: #ff9da3;
    --bad-back: #40181b;
  }
}
* { box-sizing: border-box; }
[hidden] { display: none !important; }
h1 { margin: 0; font-size: clamp(1.4rem, 5vw, 1.9rem); line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin: 0; font-size: 1rem; }
p { margin: 0; }
header { display: flex; flex-wrap: wrap; gap: 0.5rem 1rem; align-items: end; justify-content: space-between; }
.soft { color: var(--soft); font-size: 0.875rem; }
.about-test { margin-top: 0.5rem; }
.runtime { display: flex; flex-wrap: wrap; gap: 0.25rem 0.6rem; align-items: center; }
.badge {
  padding: 0.1rem 0.65rem;
  border-radius: 1rem;
  border: 1px solid var(--line);
  background: var(--card);
  font-size: 0.8125rem;
  font-weight: 600;
}
.badge.passed { background: var(--good-back); color: var(--good); border-color: transparent; }
.badge.failed { background: var(--bad-back); color: var(--bad); border-color: transparent; }
.card {
  margin-top: 1rem;
  padding: clamp(0.85rem, 3vw, 1.25rem);
  border: 1px solid var(--line);
  border-radius: 0.9rem;
  background: var(--card);
}
.alert { color: var(--bad); background: var(--bad-back); border-color: transparent; overflow-wrap: anywhere; }
form { display: flex; flex-wrap: wrap; gap: 0.75rem 1.25rem; align-items: end; }
label { display: grid; gap: 0.25rem; font-size: 0.8125rem; font-weight: 600; color: var(--soft); }
.joined { display: flex; gap: 0.4rem; }
input[type="text"], input[type="number"] {
  width: 11.5rem;
  min-width: 0;
  height: 2.5rem;
  padding: 0 0.7rem;
  border: 1px solid var(--line);
  border-radius: 0.55rem;
  background: var(--field);
  color: var(--ink);
  font: 1rem ui-monospace, monospace;
}
input[type="number"] { width: 6rem; }
.count { flex: 1 1 12rem; }
input[type="range"] { width: 100%; height: 2.5rem; margin: 0; accent-color: var(--accent); }
button { font: inherit; color: inherit; cursor: pointer; }
.action {
  height: 2.5rem;
  padding: 0 1.1rem;
  border: 1px solid var(--line);
  border-radius: 0.55rem;
  background: var(--field);
  font-weight: 600;
}
.action.main { background: var(--accent); border-color: var(--accent); color: var(--on-accent); }
.action:disabled { opacity: 0.55; cursor: progress; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
.images { display: grid; grid-template-columns: repeat(auto-fill, minmax(max(var(--tile), 10.5%), 1fr)); gap: 0.5rem; margin-top: 1rem; }
.tile { padding: 0; border: 0; border-radius: 0.5rem; background: none; line-height: 0; }
.tile[aria-pressed="true"] { outline: 3px solid var(--accent); outline-offset: 2px; }
canvas {
  width: 100%;
  border-radius: 0.5rem;
  outline: 1px solid var(--line);
  outline-offset: -1px;
  image-rendering: pixelated;
  background: var(--field);
}
.waiting { aspect-ratio: 1; border-radius: 0.5rem; background: var(--field); }
.title { display: flex; flex-wrap: wrap; gap: 0.25rem 0.75rem; align-items: center; justify-content: space-between; }
.steps {
  display: grid;
  grid-template-columns: repeat(auto-fit, minmax(5.25rem, 1fr));
  gap: 0.6rem;
  margin: 0.75rem 0 0;
  padding: 0;
  list-style: none;
}
.steps li { max-width: 11rem; text-align: center; font-size: 0.8125rem; }
.steps small { display: block; color: var(--soft); font-size: 0.75rem; }
.steps li:last-child canvas { outline: 2px solid var(--accent); outline-offset: -2px; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: 0.75rem 1.25rem; margin: 0.85rem 0 0; }
dt { color: var(--soft); font-size: 0.8125rem; }
dd { margin: 0; font: 600 1rem/1.4 ui-monospace, monospace; }
`;
