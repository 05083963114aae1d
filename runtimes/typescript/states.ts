/**
 * The states inside a sampler's graph, as outputs, without taking the graph apart.
 *
 * In protobuf's wire format, messages written one after the other are one message: lists are joined and inner messages
 * merged (https://protobuf.dev/programming-guides/encoding/#last-one-wins). So the checked bytes of a model, followed by
 * a model that holds nothing but a graph with further outputs, are that model with those outputs. Field numbers:
 * https://github.com/onnx/onnx/blob/main/onnx/onnx.proto.
 */

import type { Bundle } from "./bundle.js";
import type { Tensor, Tensors } from "./tensors.js";
import { size } from "./tensors.js";

const MODEL_GRAPH = 7, GRAPH_OUTPUT = 12, VALUE_NAME = 1, VALUE_TYPE = 2, TYPE_TENSOR = 1, TENSOR_ELEMENT = 1;
const FLOAT = 1;
const LOOP_STATES = "states"; // of a graph in the form of a loop: one value (K, B, C, H, W)

/** What the graph calls its states. */
export function stateNames({ manifest }: Bundle): string[] {
  return manifest.form === "loop" ? [LOOP_STATES] : manifest.steps.map((_, k) => `state.${k + 1}`);
}

/** `model`, ONNX, with float32 values of its graph as further outputs. */
export function withOutputs(model: Uint8Array, names: readonly string[]): Uint8Array<ArrayBuffer> {
  const type = message(VALUE_TYPE, message(TYPE_TENSOR, [(TENSOR_ELEMENT << 3) | 0, FLOAT]));
  const outputs = names.flatMap((name) =>
    message(GRAPH_OUTPUT, [...message(VALUE_NAME, [...new TextEncoder().encode(name)]), ...type]),
  );
  const further = message(MODEL_GRAPH, outputs);
  const whole = new Uint8Array(model.length + further.length);
  whole.set(model);
  whole.set(further, model.length);
  return whole;
}

/** `state.1` ... `state.K` (B, C, H, W) of a run. */
export function statesOf(bundle: Bundle, results: Tensors): Tensor[] {
  if (bundle.manifest.form !== "loop") return stateNames(bundle).map((name) => results[name]);
  const { shape, values } = results[LOOP_STATES];
  const inner = size(shape.slice(1));
  return Array.from({ length: shape[0] }, (_, k) => ({
    dtype: "float32", shape: shape.slice(1), values: (values as Float32Array<ArrayBuffer>).slice(k * inner, (k + 1) * inner),
  }));
}

/** A field of bytes: its number and wire type 2, its length, its content. */
function message(field: number, content: readonly number[]): number[] {
  return [(field << 3) | 2, ...varint(content.length), ...content];
}

function varint(value: number): number[] {
  return value < 0x80 ? [value] : [(value & 0x7f) | 0x80, ...varint(value >>> 7)];
}
