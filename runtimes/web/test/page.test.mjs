/** The built page in Chromium: images, steps, self-test, other pages, offline, damaged bundles, WebGPU. */

import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";
import { cpus } from "node:os";
import { join } from "node:path";
import { after, before, describe, test } from "node:test";

import { findChromium, ISOLATING, launch, serve, watchedPage } from "./site.mjs";

const attacks = process.env.MMD_ATTACKS; // a folder that `python -m tests.attacks` of mmd-export wrote
const noBrowser = findChromium() ? false : "no Chromium: set CHROMIUM to the path of one";
const PLAIN = '<!doctype html><title>plain</title><link rel="icon" href="data:,">';

/** Wait for the end of the element's self-test. */
const tested = (page) => page.waitForFunction(() => document.querySelector("mmd-sampler").lastSelfTest, null, { timeout: 60_000 });

describe("on WebAssembly", { skip: noBrowser }, () => {
  let browser, site, context, page, problems;

  before(async () => {
    site = await serve(attacks ? { attacks } : {});
    browser = await launch();
    ({ context, page, problems } = await watchedPage(browser, site.url));
    await page.goto(site.url);
    await tested(page);
    await page.locator(".steps li").first().waitFor();
  });

  after(async () => {
    await browser?.close();
    await site?.close();
  });

  test("the images are there, all different", async () => {
    const pictures = await page.locator(".tile canvas").evaluateAll((all) => all.map((canvas) => canvas.toDataURL()));
    assert.equal(pictures.length, 16);
    assert.equal(new Set(pictures).size, 16);
  });

  test("the page says that it fell back, and why", async () => {
    assert.equal(await page.locator(".backend").textContent(), "WebAssembly");
    assert.match(await page.locator(".note").textContent(), /instead of WebGPU: this browser /);
  });

  test("the self-test passes and is shown", async () => {
    const found = await page.evaluate(() => document.querySelector("mmd-sampler").lastSelfTest);
    assert.ok(found.passed, JSON.stringify(found));
    assert.equal(found.runtime, "onnxruntime-web on WebAssembly");
    assert.equal(await page.locator(".verdict").textContent(), "passed");
  });

  test("every state is golden, and the page shows each", async () => {
    const { errors, atol } = await page.evaluate(async () => {
      const { sampler } = document.querySelector("mmd-sampler");
      return { errors: await sampler.stateErrors(), atol: sampler.about.manifest.atol };
    });
    assert.ok(Math.max(...errors) <= atol, `${errors}`);
    assert.equal(await page.locator(".steps li").count(), errors.length + 1);
  });

  test("a chosen image shows its own steps", async () => {
    const before = await page.locator(".steps li:last-child canvas").evaluate((canvas) => canvas.toDataURL());
    await page.locator(".seed").fill("99"); // not drawn: the steps are those of the images that are shown
    await page.locator(".tile").nth(3).click();
    await page.getByText("From noise to image 3").waitFor();
    const after = await page.locator(".steps li:last-child canvas").evaluate((canvas) => canvas.toDataURL());
    const tile = await page.locator(".tile canvas").nth(3).evaluate((canvas) => canvas.toDataURL());
    assert.notEqual(after, before);
    assert.equal(after, tile);
  });

  test("without a connection another seed is drawn", async () => {
    const before = await page.locator(".tile canvas").first().evaluate((canvas) => canvas.toDataURL());
    await context.setOffline(true);
    await page.locator(".seed").fill("12345678901234567890");
    await page.evaluate(() => {
      window.drawn = new Promise((resolve) => {
        document.querySelector("mmd-sampler").addEventListener("mmd-drawn", resolve, { once: true });
      });
    });
    await page.locator(".draw").click();
    await page.evaluate(() => window.drawn.then(() => undefined));
    await context.setOffline(false);
    const after = await page.locator(".tile canvas").first().evaluate((canvas) => canvas.toDataURL());
    assert.notEqual(after, before);
  });

  test("streams of noise have the hashes of the contract, a million values each", async () => {
    const hashes = await page.evaluate(async () => {
      const { normal } = await import("./mmd-sampler.js");
      const streams = [normal(7, 1_000_000), normal(2n ** 64n - 1n, 1_000_000, 2 ** 32 - 1, 3)];
      const digests = await Promise.all(streams.map((values) => crypto.subtle.digest("SHA-256", values)));
      const hex = (byte) => byte.toString(16).padStart(2, "0");
      return digests.map((digest) => Array.from(new Uint8Array(digest), hex).join(""));
    });
    assert.deepEqual(hashes, [
      "342a1a10126ff254fcbbe025dbb95099dee21398909dd9384b51b6850c7224d1",
      "9246ac2c5f0b1983eb4268e6a04abc25e6d6ff155aebd2eeb0291d959015c120",
    ]);
  });

  test("another page takes the element and the functions from mmd-sampler.js", async () => {
    const { page: other, problems: others, context: its } = await watchedPage(browser, site.url);
    await other.route("**/plain.html", (route) => route.fulfill({
      contentType: "text/html",
      body: `${PLAIN}<script type="module" src="mmd-sampler.js"></script><mmd-sampler bundle="./bundle/" count="2"></mmd-sampler>`,
    }));
    await other.goto(`${site.url}plain.html`);
    await other.locator(".tile").nth(1).waitFor();
    await other.locator(".steps li").first().waitFor();
    assert.equal(await other.locator(".tile").count(), 2);
    const api = await other.evaluate(async () => {
      const { classLabels, openBundle } = await import("./mmd-sampler.js");
      const sampler = await openBundle("./bundle/", { backend: "wasm" });
      const classes = sampler.about.manifest.inputs.some(({ name }) => name === "class_labels");
      const conditions = (count) => (classes ? { class_labels: classLabels(0, count) } : {});
      const { passed } = await sampler.selfTest(1);
      const wrong = await sampler.sample(-1).catch((error) => error.name);
      const seven = await sampler.sample(7, { count: 2, conditions: conditions(2) });
      const last = await sampler.sample(7, { first: 1, conditions: conditions(1) });
      sampler.close();
      const size = last.values.length;
      const off = last.values.map((value, i) => Math.abs(value - seven.values[size + i]));
      return { passed, wrong, off: Math.max(...off) };
    });
    assert.equal(api.wrong, "UsageError");
    assert.ok(api.passed && api.off <= 1e-5);
    await other.goto(`${site.url}api.html`);
    await other.getByText("self-test passed").waitFor();
    assert.deepEqual(others, []);
    await its.close();
  });

  test("on several threads, where the server isolates the page, the images are the same", async () => {
    const isolated = await serve({}, ISOLATING);
    const { page: other, problems: others, context: its } = await watchedPage(browser, isolated.url);
    await other.goto(isolated.url);
    await tested(other);
    const { passed, threads } = await other.evaluate(() => {
      const { lastSelfTest, sampler } = document.querySelector("mmd-sampler");
      return { passed: lastSelfTest.passed, threads: sampler.about.threads };
    });
    assert.ok(passed);
    assert.equal(threads, Math.min(4, Math.ceil(cpus().length / 2)));
    assert.deepEqual(others, []);
    await its.close();
    await isolated.close();
  });

  test("nothing was complained about, and nothing asked for elsewhere", () => assert.deepEqual(problems, []));

  test("every damaged bundle is refused", { skip: attacks ? false : "MMD_ATTACKS names no folder" }, async (t) => {
    const index = JSON.parse(await readFile(join(attacks, "index.json"), "utf8"));
    const seen = index.attacks.filter((attack) => !attack.needs_listing); // fetched by name: a folder is not listed
    assert.ok(seen.length > 30);
    for (const { id, what, says } of seen) {
      await t.test(`${id}: ${what}`, async () => {
        const refused = await page.evaluate(async (url) => {
          const { openBundle } = await import("./mmd-sampler.js");
          return openBundle(url, { backend: "wasm" }).then(() => null, ({ name, message }) => ({ name, message }));
        }, `attacks/${encodeURIComponent(id)}/`);
        assert.ok(refused, "it was opened");
        assert.equal(refused.name, "BundleError", refused.message);
        assert.ok(refused.message.includes(says), refused.message);
      });
    }
  });

  test("the element says why a bundle is refused", { skip: attacks ? false : "MMD_ATTACKS names no folder" }, async () => {
    await page.evaluate(() => {
      document.querySelector("mmd-sampler").outerHTML = '<mmd-sampler bundle="attacks/edited-artefact/"></mmd-sampler>';
    });
    await page.locator(".alert").filter({ hasText: "has SHA-256" }).waitFor();
  });
});

describe("on WebGPU in software", { skip: noBrowser }, () => {
  let browser, site;

  before(async () => {
    site = await serve();
    browser = await launch({ webgpu: true });
  });

  after(async () => {
    await browser?.close();
    await site?.close();
  });

  test("an image is that of WebAssembly, within the tolerance", async () => {
    const { page, problems } = await watchedPage(browser, site.url);
    await page.route("**/plain.html", (route) => route.fulfill({ contentType: "text/html", body: PLAIN }));
    await page.goto(`${site.url}plain.html`);
    const { runtime, off, atol } = await page.evaluate(async () => {
      const { openBundle } = await import("./mmd-sampler.js");
      const [gpu, wasm] = await Promise.all(["webgpu", "wasm"].map((backend) => openBundle("./bundle/", { backend })));
      const [found, expected] = [await gpu.sample(7), await wasm.sample(7)];
      const off = Math.max(...found.values.map((value, i) => Math.abs(value - expected.values[i])));
      return { runtime: gpu.about.runtime, off, atol: gpu.about.manifest.atol };
    });
    assert.equal(runtime, "onnxruntime-web on WebGPU");
    assert.ok(off <= atol, `${off}`);
    assert.deepEqual(problems, []);
  });
});
