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
        let several = try sampler.sample(seed: 7, count: 3)
        let one = try sampler.sample(seed: 7, count: 1, first: 2)
        XCTAssertEqual(several.count, 3)
        for (a, b) in zip(several[2], one[0]) { XCTAssertEqual(a, b, accuracy: 1e-3) }
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
