/**
 * Measure the built page: `node test/measure.mjs LOADS` prints JSON.
 *
 * Each load has a fresh browser profile (nothing is cached) and a local web server. Times are milliseconds; the first image
 * counts from the start of the navigation. Bytes are those of the answers, uncompressed.
 */

import { findChromium, ISOLATING, launch, serve, watchedPage } from "./site.mjs";

const loads = Number(process.argv[2] ?? 10);

/** ONNX Runtime, the bundle, or the page itself. */
function kind(path) {
  if (/^assets\/ort[.-]/.test(path)) return "runtime";
  return path.startsWith("bundle/") ? "bundle" : "page";
}

async function load(browser, site) {
  const { context, page, problems } = await watchedPage(browser, site.url);
  const answers = [];
  page.on("response", (response) => answers.push(response));
  await page.goto(site.url);
  await page.waitForFunction(() => document.querySelector("mmd-sampler").lastSelfTest, null, { timeout: 60_000 });
  const bytes = { page: 0, bundle: 0, runtime: 0 };
  for (const answer of answers) {
    bytes[kind(new URL(answer.url()).pathname.slice(1))] += (await answer.body()).length;
  }
  const found = await page.evaluate(() => {
    const { lastSelfTest, sampler } = document.querySelector("mmd-sampler");
    const [{ startTime }] = performance.getEntriesByName("mmd-first-image");
    const { backend, threads, times } = sampler.about;
    return { firstImage: startTime, selfTest: lastSelfTest, backend, threads, times };
  });
  await context.close();
  return { ...found, bytes, problems };
}

const site = await serve({}, ISOLATING);
const results = [];
let browserVersion = "";
for (let i = 0; i < loads; i++) {
  const browser = await launch();
  browserVersion = browser.version();
  results.push(await load(browser, site));
  await browser.close();
}
await site.close();
console.log(JSON.stringify({ chromium: browserVersion, executable: findChromium()?.split("/").at(-1), loads: results }));
