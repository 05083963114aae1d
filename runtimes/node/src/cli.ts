#!/usr/bin/env node
/** Images of a seed as a PNG, or the self-test. Exits 0, or 2, 3, 4, 5 as the messages say. */

import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";

import type { Tensors } from "./core/index.js";
import { classLabels, KitError, oneLine, picture, report, sheet, UsageError } from "./core/index.js";
import { open, savePng } from "./index.js";

const USAGE = `usage: mmd-sample [--bundle DIR] [--seed S] [--count N] [--class-label C] [--out FILE.png] [--threads N]
       mmd-sample [--bundle DIR] --self-test`;
const BUNDLE = fileURLToPath(new URL("../../bundle", import.meta.url));

const OPTIONS = {
  bundle: { type: "string", default: BUNDLE },
  seed: { type: "string", default: "0" },
  count: { type: "string", default: "16" },
  "class-label": { type: "string" },
  out: { type: "string", default: "sample.png" },
  threads: { type: "string", default: "0" },
  "self-test": { type: "boolean", default: false },
  help: { type: "boolean", default: false },
} as const;

async function main(): Promise<number> {
  const options = read();
  if (options.help) {
    console.log(USAGE);
    return 0;
  }
  const sampler = await open(options.bundle, { threads: whole("threads", options.threads) });
  if (options["self-test"]) {
    const test = await sampler.selfTest();
    console.log(report(test));
    return test.passed ? 0 : 4;
  }
  const count = whole("count", options.count);
  const conditions: Tensors = options["class-label"] === undefined
    ? {} : { class_labels: classLabels(whole("class-label", options["class-label"]), count) };
  const images = await sampler.sample(BigInt(digits("seed", options.seed)), { count, conditions });
  await savePng(sheet(Array.from({ length: count }, (_, i) => picture(images, i))), options.out);
  console.log(`${options.out}: ${count} images of seed ${options.seed}`);
  return 0;
}

function read() {
  try {
    return parseArgs({ options: OPTIONS }).values;
  } catch (error) {
    throw new UsageError(`${oneLine(error)}; ${USAGE.split("\n")[0]}`);
  }
}

function digits(name: string, text: string): string {
  if (!/^[0-9]{1,20}$/.test(text)) throw new UsageError(`--${name} is '${text}'; give a whole number`);
  return text;
}

function whole(name: string, text: string): number {
  return Number(digits(name, text));
}

main().then(
  (code) => { process.exitCode = code; },
  (error: unknown) => {
    if (!(error instanceof KitError)) throw error;
    console.error(`error: ${error.message}`);
    process.exitCode = error.exitCode;
  },
);
