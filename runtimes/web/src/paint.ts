/** Pictures on a canvas. */

import type { Picture } from "./core/index.js";
import { rgba } from "./core/index.js";

/** Make the canvas as large as the picture and draw it. */
export function paint(canvas: HTMLCanvasElement, picture: Picture): HTMLCanvasElement {
  canvas.width = picture.width;
  canvas.height = picture.height;
  canvas.getContext("2d")?.putImageData(new ImageData(rgba(picture).pixels, picture.width, picture.height), 0, 0);
  return canvas;
}
