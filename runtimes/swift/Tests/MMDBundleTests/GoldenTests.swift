import CoreML
import XCTest

@testable import MMDBundle

final class GoldenTests: XCTestCase {
    /// The self-test: the golden noise gives the golden images on this device.
    func testGolden() async throws {
        let sampler = try await Sampler(SamplerBundle.embedded())
        let result = try sampler.selfTest()
        print(result.line)
        XCTAssert(result.passed, result.line)
    }

    func testImageDoesNotDependOnItsBatch() async throws {
        let sampler = try await Sampler(SamplerBundle.embedded())
        if let other = sampler.conditionSpecs.first(where: { $0.name != "class_labels" }) {
            throw XCTSkip("the model takes '\(other.name)', which a seed does not give")
        }
        let several = try sampler.sample(seed: 7, count: 3, classLabels: sampler.classZero(3))
        let one = try sampler.sample(seed: 7, count: 1, first: 2, classLabels: sampler.classZero(1))
        XCTAssertEqual(several.count, 3)
        for (a, b) in zip(several[2], one[0]) { XCTAssertEqual(a, b, accuracy: 1e-3) }
    }

    /// Wrong arguments are an error of one line, and end no app.
    func testWrongArguments() async throws {
        let sampler = try await Sampler(SamplerBundle.embedded())
        let nose = MLMultiArray(MLShapedArray<Float>(scalars: [0], shape: [1]))
        for (count, first) in [(0, 0), (-1, 0), (1, -1), (2, Int(UInt32.max))] {
            let labels = sampler.classZero(max(count, 0))
            XCTAssertThrowsError(try sampler.sample(seed: 7, count: count, first: first, classLabels: labels)) {
                XCTAssert("\($0)".contains("ask for one or more below 2^32"), "\($0)")
            }
        }
        XCTAssertThrowsError(try sampler.sample(seed: 7, count: 1, conditions: ["nose": nose]))
        XCTAssertThrowsError(try sampler.sample(seed: 7, count: 2, classLabels: [0]))
    }

    /// The package is compiled once: what the first one kept loads, and is the same model.
    func testTheSecondOpeningTakesTheKeptModel() async throws {
        let bundle = try SamplerBundle.embedded()
        guard bundle.manifest.artefact.hasSuffix(".mlpackage") else { throw XCTSkip("the bundle is compiled already") }
        _ = try await Sampler(bundle)
        let caches = try FileManager.default.url(
            for: .cachesDirectory, in: .userDomainMask, appropriateFor: nil, create: false)
        let kept = caches.appendingPathComponent("MMDBundle/\(bundle.manifest.manifest_sha256).mlmodelc")
        XCTAssert(FileManager.default.fileExists(atPath: kept.path), kept.path)
        let result = try await Sampler(bundle).selfTest()
        XCTAssert(result.passed, result.line)
    }

    /// Every damaged bundle of `python -m tests.attacks` is refused; MMD_ATTACKS is the folder that it wrote.
    func testAttacks() throws {
        guard let path = ProcessInfo.processInfo.environment["MMD_ATTACKS"] else {
            throw XCTSkip("MMD_ATTACKS names no folder of damaged bundles")
        }
        let folder = URL(fileURLWithPath: path)
        let index = try JSONSerialization.jsonObject(with: Data(contentsOf: folder.appendingPathComponent("index.json")))
        let attacks = try XCTUnwrap((index as? [String: Any])?["attacks"] as? [[String: Any]])
        XCTAssertGreaterThan(attacks.count, 30)
        for attack in attacks {
            let (id, says) = (attack["id"] as? String ?? "", attack["says"] as? String ?? "")
            XCTAssertThrowsError(try SamplerBundle(folder: folder.appendingPathComponent(id)), id) { error in
                XCTAssert("\(error)".contains(says), "\(id): \(error) does not say \(says)")
            }
        }
    }
}
