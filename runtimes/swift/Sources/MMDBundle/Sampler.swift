import CoreML
import Foundation

/// What the golden noise gave on this device, against the float64 reference.
public struct SelfTest {
    public let images: Int
    public let worst: Double
    public let tolerance: Double
    public let milliseconds: Double
    public var passed: Bool { worst <= tolerance }  // NaN is not
    public var line: String {
        String(
            format: "self-test %@: %d images, largest error %.3g (tolerance %g), %.2f ms a batch",
            passed ? "passed" : "FAILED", images, worst, tolerance, milliseconds)
    }
}

/// A bundle with its Core ML model loaded.
public final class Sampler {
    public let bundle: SamplerBundle
    private let model: MLModel
    private let batch: Int

    /// Loads `model.mlpackage`, which is compiled first, or a `model.mlmodelc` that lies beside it in its place.
    /// `units`: by default what the bundle was built for.
    public init(_ bundle: SamplerBundle, units: MLComputeUnits? = nil) async throws {
        let manifest = bundle.manifest
        guard manifest.format == "mlpackage", manifest.outputs[0].dtype == "float32" else {
            throw SamplerError(
                description: "bundle \(manifest.name) holds \(manifest.format) with output \(manifest.outputs[0].dtype), "
                    + "this package runs mlpackage with float32; build for target coreml with --output float32")
        }
        self.bundle = bundle
        batch = manifest.inputs.first { $0.name == "noise" }!.shape[0]
        let settings = MLModelConfiguration()
        settings.computeUnits = units ?? Self.units(manifest.hardware?["compute_units"])
        let artefact = bundle.folder.appendingPathComponent(manifest.artefact)
        let compiled = artefact.pathExtension == "mlmodelc" ? artefact : try await MLModel.compileModel(at: artefact)
        model = try await MLModel.load(contentsOf: compiled, configuration: settings)
    }

    static func units(_ name: String?) -> MLComputeUnits {
        switch name {
        case "cpu": return .cpuOnly
        case "cpu-gpu": return .cpuAndGPU
        case "cpu-ane": return .cpuAndNeuralEngine
        default: return .all
        }
    }

    /// The shape of one image, (C, H, W).
    public var imageShape: [Int] { Array(bundle.manifest.outputs[0].shape.dropFirst()) }

    /// Images `first` ... of a seed, each C * H * W values in [-1, 1]. `classLabels`: one an image, if the model has classes.
    public func sample(seed: UInt64, count: Int, first: Int = 0, classLabels: [Int32] = []) throws -> [[Float]] {
        var images: [[Float]] = []
        for start in stride(from: 0, to: count, by: batch) {
            let chosen = (start..<start + batch).map { min($0, count - 1) }
            var inputs: [String: MLMultiArray] = [:]
            for spec in bundle.manifest.inputs {
                inputs[spec.name] = try input(spec, seed, chosen.map { UInt32(first + $0) }, chosen, classLabels)
            }
            images += try run(inputs).prefix(count - start)
        }
        return images
    }

    private func input(
        _ spec: Manifest.Spec, _ seed: UInt64, _ indices: [UInt32], _ chosen: [Int], _ labels: [Int32]
    ) throws -> MLMultiArray {
        let size = spec.shape.reduce(1, *) / batch
        switch spec.name {
        case "noise":
            let values = indices.flatMap { Noise.normal(seed: seed, stream: 0, image: $0, count: size) }
            return MLMultiArray(MLShapedArray(scalars: values, shape: spec.shape))
        case "step_noise":
            let values = (1...spec.shape[0]).flatMap { stream in
                indices.flatMap {
                    Noise.normal(seed: seed, stream: UInt32(stream), image: $0, count: size / spec.shape[0])
                }
            }
            return MLMultiArray(MLShapedArray(scalars: values, shape: spec.shape))
        case "class_labels" where chosen.allSatisfy(labels.indices.contains):
            return MLMultiArray(MLShapedArray(scalars: chosen.map { labels[$0] }, shape: spec.shape))
        default:
            throw SamplerError(description: "bundle \(bundle.manifest.name): input '\(spec.name)' is missing; give it")
        }
    }

    /// One batch through the graph.
    func run(_ inputs: [String: MLMultiArray]) throws -> [[Float]] {
        let output = try model.prediction(from: MLDictionaryFeatureProvider(dictionary: inputs))
        guard let sample = output.featureValue(for: "sample")?.multiArrayValue else {
            throw SamplerError(description: "bundle \(bundle.manifest.name): the model gave no 'sample'; rebuild the bundle")
        }
        let values = MLShapedArray<Float>(converting: sample).scalars
        let size = values.count / batch
        return (0..<batch).map { Array(values[$0 * size..<($0 + 1) * size]) }
    }

    /// Run the golden inputs, compare, and time `rounds` passes of the first batch.
    public func selfTest(rounds: Int = 5) throws -> SelfTest {
        let expected = bundle.golden["sample"]!  // the bundle was checked when it was opened
        let count = expected.shape[0]
        var found: [Float] = []
        var fault = false
        for start in stride(from: 0, to: count, by: batch) {
            for image in try run(goldenInputs(start)) {
                fault = fault || image.allSatisfy { $0 == image[0] } || !image.allSatisfy(\.isFinite)
                found += image
            }
        }
        fault = fault || found.count != expected.floats.count
        let worst = zip(found, expected.floats).map { Double(abs($0 - $1)) }.max() ?? .infinity
        let first = try goldenInputs(0)
        let times = try (0..<max(rounds, 1)).map { _ -> Double in
            let start = DispatchTime.now().uptimeNanoseconds
            _ = try run(first)
            return Double(DispatchTime.now().uptimeNanoseconds - start) / 1e6
        }.sorted()
        return SelfTest(
            images: count, worst: fault ? .infinity : worst, tolerance: bundle.manifest.tolerance.atol,
            milliseconds: times[times.count / 2])
    }

    private func goldenInputs(_ start: Int) throws -> [String: MLMultiArray] {
        var inputs: [String: MLMultiArray] = [:]
        for spec in bundle.manifest.inputs {
            let golden = bundle.golden[spec.name]!  // as above
            if spec.name == "step_noise" {
                let row = golden.floats.count / golden.shape[0] / golden.shape[1]
                let values = (0..<golden.shape[0]).flatMap { step -> ArraySlice<Float> in
                    let place = (step * golden.shape[1] + start) * row
                    return golden.floats[place..<place + batch * row]
                }
                inputs[spec.name] = MLMultiArray(MLShapedArray(scalars: values, shape: spec.shape))
            } else if golden.integers.isEmpty {
                let row = golden.floats.count / golden.shape[0]
                let values = Array(golden.floats[start * row..<(start + batch) * row])
                inputs[spec.name] = MLMultiArray(MLShapedArray(scalars: values, shape: spec.shape))
            } else {
                let row = golden.integers.count / golden.shape[0]
                let values = Array(golden.integers[start * row..<(start + batch) * row])
                inputs[spec.name] = MLMultiArray(MLShapedArray(scalars: values, shape: spec.shape))
            }
        }
        return inputs
    }
}
