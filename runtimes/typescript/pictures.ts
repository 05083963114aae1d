/** Tensors as pixels. */

import { NotAvailableError } from "./errors.js";
import type { Tensor } from "./tensors.js";

/** Pixels row by row, top left first, `channels` bytes each: 1 is grey, 3 is RGB, 4 is RGBA. */
export interface Picture {
  readonly width: number;
  readonly height: number;
  readonly channels: number;
  readonly pixels: Uint8ClampedArray<ArrayBuffer>;
}

const GAP = 2;
const SMALLEST_TILE = 48; // pixels; an 8x8 digit is not legible below

/** Image `index` of float32 (N, C, H, W), `round((clamp(x * scale, -1, 1) + 1) * 127.5)`, or of uint8 (N, H, W, C). */
export function picture(images: Tensor, index: number, scale = 1): Picture {
  const nhwc = images.dtype === "uint8";
  const [height, width, channels] = nhwc ? images.shape.slice(1) : [images.shape[2], images.shape[3], images.shape[1]];
  if (images.shape.length !== 4 || (channels !== 1 && channels !== 3)) {
    throw new NotAvailableError(`(${images.shape.join(", ")}) is no picture: that has 1 or 3 channels; decode it first`);
  }
  const inner = height * width * channels;
  const values = images.values.subarray(index * inner, (index + 1) * inner);
  const pixels = new Uint8ClampedArray(inner);
  for (let i = 0; i < inner; i++) {
    if (nhwc) pixels[i] = Number(values[i]);
    else pixels[(i % (height * width)) * channels + Math.floor(i / (height * width))] = level(Number(values[i]) * scale);
  }
  return { width, height, channels, pixels };
}

function level(value: number): number {
  return Math.round((Math.min(Math.max(value, -1), 1) + 1) * 127.5);
}

/** The same with an alpha of 255, as a canvas takes it. */
export function rgba({ width, height, channels, pixels }: Picture): Picture {
  const wide = new Uint8ClampedArray(width * height * 4).fill(255);
  for (let i = 0; i < width * height; i++) {
    for (let c = 0; c < 3; c++) wide[4 * i + c] = pixels[i * channels + (channels === 1 ? 0 : c)];
  }
  return { width, height, channels: 4, pixels: wide };
}

/** Pictures side by side on white, in a near-square sheet, enlarged so that each has at least 48 pixels. */
export function sheet(pictures: readonly Picture[]): Picture {
  const [{ width, height, channels }] = pictures;
  const across = Math.ceil(Math.sqrt(pictures.length));
  const factor = Math.max(1, Math.ceil(SMALLEST_TILE / Math.min(width, height)));
  const high = height * factor + GAP, wide = width * factor + GAP;
  const total = { width: across * wide - GAP, height: Math.ceil(pictures.length / across) * high - GAP };
  const pixels = new Uint8ClampedArray(total.width * total.height * channels).fill(255);
  pictures.forEach((tile, index) => {
    const top = Math.floor(index / across) * high, left = (index % across) * wide;
    for (let y = 0; y < height * factor; y++) {
      for (let x = 0; x < width * factor; x++) {
        const from = (Math.floor(y / factor) * width + Math.floor(x / factor)) * channels;
        const to = ((top + y) * total.width + left + x) * channels;
        for (let c = 0; c < channels; c++) pixels[to + c] = tile.pixels[from + c];
      }
    }
  });
  return { ...total, channels, pixels };
}
