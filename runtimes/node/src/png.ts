/** Pictures as PNG files. */

import { rename, writeFile } from "node:fs/promises";

import pngjs from "pngjs";

import type { Picture } from "./core/index.js";
import { rgba } from "./core/index.js";

/** The bytes of a PNG, grey or RGB as the picture. */
export function png(picture: Picture): Buffer {
  const { width, height, pixels } = rgba(picture);
  const image = new pngjs.PNG({ width, height });
  image.data = Buffer.from(pixels.buffer);
  return pngjs.PNG.sync.write(image, { colorType: picture.channels === 1 ? 0 : 2 });
}

/** Write a PNG that appears complete or not at all. */
export async function savePng(picture: Picture, path: string): Promise<void> {
  const partial = `${path}.partial-${process.pid}`;
  await writeFile(partial, png(picture));
  await rename(partial, path);
}
