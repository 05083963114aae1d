import CoreML
import Foundation

/// What the golden noise gave on this device, against the float64 reference.
public struct SelfTest {
    public let bundle: String
    public let images: Int
    public let worst: Double
    public let tolerance: Double
    /// The mean absolute error over all values of all images, and what it may be.
    public let mean: Double
    public let meanLimit: Double
    public let milliseconds: Double
    public var passed: Bool { worst <= tolerance && mean <= meanLimit }  // NaN is not
    public var line: String {
        String(
            format: "self-test %@: %@ in Core ML, %d images, largest error %.3g (tolerance %g), %.2f ms a batch",
            verdict, bundle, images, worst, tolerance, milliseconds)
    }
    private var verdict: String {
        if passed { return "passed" }
        guard worst <= tolerance else { return "FAILED" }
        return String(format: "FAILED mean error %.3g (limit %.3g)", mean, meanLimit)
    }
}

/// A bundle with its Core ML model loaded.
public final class Sampler {
    public let bundle: SamplerBundle
    private let model: MLModel
    private let batch: Int

    /// Loads `model.mlpackage`, which is compiled once on a device, or a `model.mlmodelc` that lies in its place.
    /// `units`: by default what the bundle was built for.
    public init(_ bundle: SamplerBundle, units: MLComputeUnits? = nil) async throws {
        let manifest = bundle.manifest
        guard manifest.format == "mlpackage", manifest.outputs[0].dtype == "float32" else {
            throw SamplerError(
                description: "bundle \(manifest.name) holds \(manifest.format) with output \(manifest.outputs[0].dtype), "
                    + "this package runs mlpackage with float32; build for target coreml with --output float32")
        }
        try Self.requireSystem(manifest)
        self.bundle = bundle
        batch = manifest.inputs.first { $0.name == "noise" }!.shape[0]
        let settings = MLModelConfiguration()
        settings.computeUnits = units ?? Self.units(manifest.hardware?["compute_units"])
        let artefact = bundle.folder.appendingPathComponent(manifest.artefact)
        if artefact.pathExtension == "mlmodelc" {
            model = try await MLModel.load(contentsOf: artefact, configuration: settings)
        } else {
            model = try await Self.load(artefact, manifest.manifest_sha256, settings)
        }
    }

    /// The model of a package, compiled once: it is kept in Caches/MMDBundle under the hash of the bundle's manifest.
    static func load(_ package: URL, _ name: String, _ settings: MLModelConfiguration) async throws -> MLModel {
        let files = FileManager.default
        let caches = try files.url(for: .cachesDirectory, in: .userDomainMask, appropriateFor: nil, create: true)
        let folder = caches.appendingPathComponent("MMDBundle", isDirectory: true)
        try? files.createDirectory(at: folder, withIntermediateDirectories: true)
        let kept = folder.appendingPathComponent("\(name).mlmodelc")
        if files.fileExists(atPath: kept.path) {
            if let model = try? await MLModel.load(contentsOf: kept, configuration: settings) { return model }
            try? files.removeItem(at: kept)  // damaged, or of another system
        }
        let compiled = try await MLModel.compileModel(at: package)
        let moved = (try? files.moveItem(at: compiled, to: kept)) != nil
        guard moved || files.fileExists(atPath: kept.path) else {  // no room there
            return try await MLModel.load(contentsOf: compiled, configuration: settings)
        }
        if !moved { try? files.removeItem(at: compiled) }  // another process was quicker
        return try await MLModel.load(contentsOf: kept, configuration: settings)
    }

    /// iOS and macOS of one year, which load the same packages.
    static let years = [(iOS: 16, macOS: 13), (iOS: 17, macOS: 14), (iOS: 18, macOS: 15), (iOS: 26, macOS: 26)]

    /// Refuses a system older than the deployment target, such as iOS17 or macOS14; Core ML judges unknown ones.
    static func requireSystem(_ manifest: Manifest) throws {
        let target = manifest.hardware?["deployment_target"] ?? ""
        guard let year = years.first(where: { target == "iOS\($0.iOS)" || target == "macOS\($0.macOS)" }) else { return }
        #if os(macOS) || targetEnvironment(macCatalyst)
        let (system, oldest) = ("macOS", year.macOS)
        #else
        let (system, oldest) = ("iOS", year.iOS)
        #endif
        let version = OperatingSystemVersion(majorVersion: oldest, minorVersion: 0, patchVersion: 0)
        guard ProcessInfo.processInfo.isOperatingSystemAtLeast(version) else {
            let here = ProcessInfo.processInfo.operatingSystemVersion
            throw SamplerError(
                description: "bundle \(manifest.name): built for \(target), which is \(system) \(oldest) or newer, "
                    + "here is \(system) \(here.majorVersion).\(here.minorVersion); "
                    + "build it again with an older --deployment-target")
        }
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
    /// `conditions`: what else the graph takes besides noise, `count` rows each, by name.
    public func sample(
        seed: UInt64, count: Int, first: Int = 0, classLabels: [Int32] = [], conditions: [String: MLMultiArray] = [:]
    ) throws -> [[Float]] {
        var given = conditions
        if !classLabels.isEmpty {
            given["class_labels"] = MLMultiArray(MLShapedArray(scalars: classLabels, shape: [classLabels.count]))
        }
        try check(count, first, given)
        var images: [[Float]] = []
        for start in stride(from: 0, to: count, by: batch) {
            let chosen = (start..<start + batch).map { min($0, count - 1) }
            var inputs: [String: MLMultiArray] = [:]
            for spec in bundle.manifest.inputs {
                inputs[spec.name] = try input(spec, seed, chosen.map { UInt32(first + $0) }, chosen, given)
            }
            images += try run(inputs).prefix(count - start)
        }
        return images
    }

    /// Labels of class 0 for `count` images, if the model has classes: for who has a seed alone.
    func classZero(_ count: Int) -> [Int32] {
        bundle.manifest.inputs.contains(where: { $0.name == "class_labels" }) ? Array(repeating: 0, count: count) : []
    }

    /// What the graph takes besides noise.
    var conditionSpecs: [Manifest.Spec] {
        bundle.manifest.inputs.filter { $0.name != "noise" && $0.name != "step_noise" }
    }

    /// Refuses arguments that the graph does not take.
    private func check(_ count: Int, _ first: Int, _ given: [String: MLMultiArray]) throws {
        func wrong(_ reason: String) -> SamplerError {
            SamplerError(description: "bundle \(bundle.manifest.name): \(reason)")
        }
        guard count >= 1, first >= 0, first <= Int(UInt32.max) - (count - 1) else {
            throw wrong("\(count) images from \(first) on; ask for one or more below 2^32")
        }
        for spec in conditionSpecs {
            guard let array = given[spec.name] else { throw wrong("input '\(spec.name)' is missing; give it") }
            let (found, says) = (array.shape.map(\.intValue), [count] + Array(spec.shape.dropFirst()))
            guard found == says else {
                throw wrong("input '\(spec.name)' is \(found), the manifest says \(says) for \(count) images")
            }
            guard let below = spec.below, spec.dtype == "int64" else { continue }
            if let outside = MLShapedArray<Int32>(converting: array).scalars.first(where: { $0 < 0 || $0 >= below }) {
                throw wrong("input '\(spec.name)' holds \(outside), the manifest says 0 to \(below - 1)")
            }
        }
        let known = Set(conditionSpecs.map(\.name))
        if let name = given.keys.sorted().first(where: { !known.contains($0) }) {
            throw wrong("input '\(name)' is unknown; leave it out")
        }
    }

    private func input(
        _ spec: Manifest.Spec, _ seed: UInt64, _ indices: [UInt32], _ chosen: [Int], _ given: [String: MLMultiArray]
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
        default:
            let array = given[spec.name]!  // check requires it
            if spec.dtype == "float32" { return rows(MLShapedArray<Float>(converting: array), chosen, spec.shape) }
            return rows(MLShapedArray<Int32>(converting: array), chosen, spec.shape)
        }
    }

    private func rows<Scalar: MLShapedArrayScalar>(
        _ array: MLShapedArray<Scalar>, _ chosen: [Int], _ shape: [Int]
    ) -> MLMultiArray {
        let scalars = array.scalars
        let row = scalars.count / array.shape[0]
        let values: [Scalar] = chosen.flatMap { scalars[$0 * row..<($0 + 1) * row] }
        return MLMultiArray(MLShapedArray(scalars: values, shape: shape))
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
        let errors = zip(found, expected.floats).map { abs(Double($0) - Double($1)) }
        let worst = errors.max() ?? .infinity
        let mean = errors.reduce(0, +) / Double(errors.count)  // NaN without any, which does not pass
        let first = try goldenInputs(0)
        let times = try (0..<max(rounds, 1)).map { _ -> Double in
            let start = DispatchTime.now().uptimeNanoseconds
            _ = try run(first)
            return Double(DispatchTime.now().uptimeNanoseconds - start) / 1e6
        }.sorted()
        let atol = bundle.manifest.tolerance.atol
        return SelfTest(
            bundle: bundle.manifest.name,
            images: count, worst: fault ? .infinity : worst, tolerance: atol, mean: mean, meanLimit: atol / 8,
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
