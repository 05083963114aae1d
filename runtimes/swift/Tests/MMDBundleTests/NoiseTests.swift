import XCTest

@testable import MMDBundle

final class NoiseTests: XCTestCase {
    /// Random123, kat_vectors, philox4x32 10.
    func testPhilox() {
        XCTAssertEqual(
            Noise.philox([0, 0, 0, 0], key: [0, 0]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8])
        XCTAssertEqual(
            Noise.philox([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], key: [0xa409_3822, 0x299f_31d0]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1])
    }

    /// The vectors of the page on noise: float32 bits, within one unit in the last place.
    func testNormal() {
        let vectors: [(UInt64, UInt32, UInt32, [UInt32])] = [
            (0, 0, 0, [0x3f7d_bb33, 0xbf6c_b6b0, 0xbf1e_1b9f, 0xbef6_d1b2]),
            (0, 1, 0, [0x3f91_747c, 0xbf2d_06ab, 0x3f9e_cbb6, 0x3e65_a217]),
            (20_261_123, 2, 1796, [0xbfe2_8a0d, 0x3e78_984e, 0x3f0b_6eee, 0xbf80_37d0]),
            (UInt64.max, 1, UInt32.max, [0xbed6_f87e, 0x3e4f_6d07, 0xbf31_0c43, 0xbf88_4c17]),
        ]
        for (seed, stream, image, bits) in vectors {
            let found = Noise.normal(seed: seed, stream: stream, image: image, count: 4).map { Int64($0.bitPattern) }
            for (one, other) in zip(found, bits) { XCTAssertLessThanOrEqual(abs(one - Int64(other)), 1) }
        }
        XCTAssertEqual(
            Noise.normal(seed: 7, stream: 0, image: 0, count: 5), Array(Noise.normal(seed: 7, stream: 0, image: 0, count: 8).prefix(5)))
    }
}
