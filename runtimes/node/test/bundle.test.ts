/** The bundle of this project: self-test, states, images, and what is refused. */

import assert from "node:assert/strict";
import { execFile } from "node:child_process";
import { cp, mkdtemp, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, test } from "node:test";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";

import pngjs from "pngjs";

import { limits } from "../src/core/selftest.js";
import type { Engine, Manifest, Sampler as Opened, Tensor, Tensors } from "../src/index.js";
import { classLabels, cpuEngine, folderSource, open, Sampler, UsageError } from "../src/index.js";

const BUNDLE = fileURLToPath(new URL("../../bundle", import.meta.url));
const CLI = fileURLToPath(new URL("../src/cli.js", import.meta.url));
const { MMD_ATTACKS: attacks } = process.env; // a folder that `python -m tests.attacks` of mmd-export wrote
let sampler: Opened;
let folder: string;

before(async () => {
  sampler = await open(BUNDLE, { threads: 1 });
  folder = await mkdtemp(join(tmpdir(), "mmd-sampler-"));
});

after(() => rm(folder, { recursive: true }));

async function run(...given: string[]): Promise<{ code: number; out: string; error: string }> {
  try {
    const { stdout, stderr } = await promisify(execFile)(process.execPath, [CLI, ...given]);
    return { code: 0, out: stdout, error: stderr };
  } catch (failure) {
    const { code, stdout, stderr } = failure as { code: number; stdout: string; stderr: string };
    return { code, out: stdout, error: stderr };
  }
}

/** What the bundle asks for beside noise: class 0 of each image. */
function told(count: number): Tensors {
  const classes = sampler.manifest.inputs.some(({ name }) => name === "class_labels");
  return classes ? { class_labels: classLabels(0, count) } : {};
}

const toldByFlag = () => (Object.keys(told(1)).length ? ["--class-label", "0"] : []);

test("the self-test passes", async () => {
  const found = await sampler.selfTest(2);
  assert.equal(found.fault, "");
  assert.ok(found.passed, `largest error ${found.worst}, tolerance ${found.tolerance}`);
  assert.ok(found.milliseconds > 0);
});

/** The engine, with its sample changed. */
function changed(change: (sample: Tensor, manifest: Manifest) => void): Engine {
  const right = cpuEngine({ threads: 1 });
  return {
    runtime: "wrong",
    async open(bundle, further) {
      const session = await right.open(bundle, further);
      return {
        release: () => session.release(),
        async run(inputs) {
          const { sample, ...rest } = await session.run(inputs);
          change(sample, bundle.manifest);
          return { sample, ...rest };
        },
      };
    },
  };
}

test("a wrong image fails the self-test", async () => {
  const wrong = changed(({ dtype, values }, { atol }) => {
    values[5] = (Number(values[5]) + (dtype === "uint8" ? 2 : 2 * atol)) as never;
  });
  const found = await (await Sampler.open(folderSource(BUNDLE), wrong)).selfTest(1);
  assert.equal(found.passed, false);
});

test("images that are all a little wrong fail the self-test", async () => {
  const wrong = changed(({ dtype, values }, { atol }) => {
    const { meanLimit } = limits(atol, dtype);
    const off = dtype === "uint8" ? Math.ceil(3 * meanLimit) : 3 * meanLimit;
    for (let i = 0; i < values.length; i++) {
      const value = Number(values[i]);
      values[i] = (value > 127 ? value - off : value + off) as never; // bytes stay from 0 to 255
    }
  });
  const found = await (await Sampler.open(folderSource(BUNDLE), wrong)).selfTest(1);
  assert.ok(found.mean > found.meanLimit);
  assert.equal(found.passed, false);
});

test("every state is golden", async () => {
  const errors = await sampler.stateErrors();
  assert.equal(errors.length, sampler.manifest.steps.length);
  assert.ok(Math.max(...errors) <= sampler.manifest.atol, `largest errors ${errors}`);
});

test("the last state is the sample", async () => {
  const { states, sample } = await sampler.chain(3, { conditions: told(1) });
  const last = states[states.length - 1];
  if (sample.dtype === "uint8" || last.shape.join() !== sample.shape.join()) return;
  last.values.forEach((value, i) => assert.equal(Math.min(Math.max(Number(value), -1), 1), Number(sample.values[i])));
});

test("an image is its seed and index, whatever is drawn with it", async () => {
  const three = await sampler.sample(5, { count: 3, conditions: told(3) });
  const last = await sampler.sample(5, { first: 2, conditions: told(1) });
  const other = await sampler.sample(6, { first: 2, conditions: told(1) });
  const difference = (a: ArrayLike<unknown>, b: ArrayLike<unknown>) =>
    Math.max(...Array.from(a, (value, i) => Math.abs(Number(value) - Number(b[i]))));
  const size = last.values.length;
  assert.ok(difference(three.values.slice(2 * size), last.values) <= 1e-5);
  assert.ok(difference(other.values, last.values) > 0.1);
});

test("wrong calls are refused", async () => {
  await assert.rejects(sampler.sample(-1), UsageError);
  await assert.rejects(sampler.sample(1, { count: 0 }), UsageError);
  const timestep = { dtype: "int64", shape: [1], values: new BigInt64Array(1) } as const;
  const conditions = { ...told(1), timestep };
  await assert.rejects(sampler.sample(1, { conditions }), /input 'timestep' is unknown/);
});

test("the command writes a picture", async () => {
  const out = join(folder, "seven.png");
  const done = await run("--seed", "7", "--count", "4", "--out", out, ...toldByFlag());
  assert.equal(done.code, 0, done.error);
  const { width, height, data } = pngjs.PNG.sync.read(await readFile(out));
  assert.ok(width >= 98 && height >= 98);
  assert.ok(new Set(data).size > 20);
});

test("the command says what is wrong and exits as it should", async () => {
  assert.equal((await run("--self-test")).code, 0);
  for (const given of [["--seed", "-1"], ["--count", "0"], ["--nonsense"], ["--bundle", folder]]) {
    const { code, error } = await run(...given);
    assert.equal(code, 2, error);
    assert.equal(error.trim().split("\n").length, 1);
  }
});

test("an edited byte is refused", async () => {
  const copy = join(folder, "edited");
  await cp(BUNDLE, copy, { recursive: true });
  const card = await readFile(join(copy, "README.md"));
  card[0] ^= 0x10;
  await writeFile(join(copy, "README.md"), card);
  const { code, error } = await run("--bundle", copy, "--self-test");
  assert.equal(code, 5);
  assert.match(error, /^error: bundle .*: 'README.md' has SHA-256 .*, the manifest says /);
});

test("every damaged bundle is refused", { skip: attacks ? false : "MMD_ATTACKS names no folder" }, async (context) => {
  const index = JSON.parse(await readFile(join(attacks as string, "index.json"), "utf8")) as Index;
  assert.ok(index.attacks.length > 30);
  for (const { id, what, says } of index.attacks) {
    await context.test(`${id}: ${what}`, async () => {
      await assert.rejects(open(join(attacks as string, id)), (error: Error) => {
        assert.equal(error.name, "BundleError");
        assert.ok(error.message.includes(says), error.message);
        assert.equal(error.message.split("\n").length, 1);
        return true;
      });
    });
  }
});

interface Index {
  attacks: { id: string; what: string; says: string }[];
}
